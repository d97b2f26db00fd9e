"""SQLAlchemyScheduleSource: schedules in a table of the broker's database."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Executable, Select, Table
from taskiq import ScheduledTask, ScheduleSource

from taskiq_sa_pg.broker.broker import SQLAlchemyBroker
from taskiq_sa_pg.broker.cron import is_cron_now
from taskiq_sa_pg.broker.schedule_rows import (
    Times,
    check_schedule_id,
    labelled_rows,
    row_of_schedule,
    schedule_of_row,
    times_of,
)
from taskiq_sa_pg.broker.ticks import Tick, has_tick, set_tick
from taskiq_sa_pg.database import Parameters
from taskiq_sa_pg.exceptions import ConfigurationError, StorageError
from taskiq_sa_pg.statements import (
    ScheduleRow,
    Sent,
    Upsert,
    delete_schedule,
    select_schedules,
    store_labelled,
    upsert_schedule,
)

logger = logging.getLogger(__name__)

# How soon a tick that could not be sent is tried again. Whole seconds, as taskiq's intervals are.
_AGAIN: Final = timedelta(seconds=5)

_SECOND: Final = timedelta(seconds=1)
_MINUTE: Final = timedelta(minutes=1)


@dataclass(slots=True)
class _Look:
    """What is known since taskiq's loop last found a schedule to be due.

    Attributes:
        times: Those of the schedule then.
        again: After how long the loop has to look again; None leaves it to the schedule.
        minute: The minute of a cron expression that is not known to be sent.
    """

    times: Times
    again: timedelta | None
    minute: datetime | None = None


class SQLAlchemyScheduleSource(ScheduleSource):
    """Keeps schedules in the broker's database: `<table_name>_schedules`.

        source = SQLAlchemyScheduleSource(broker)
        scheduler = TaskiqScheduler(broker, [source])

    They survive restarts. Any number of schedulers may run, `taskiq scheduler app:scheduler`, and
    each tick is sent once: in the minute of a cron expression, when an interval has passed since
    its last tick, whoever sent that, and at the time of what is due once, or later, if no
    scheduler ran. Cron expressions that were due while none ran are not made up for.

    startup() stores the schedules in the labels of the broker's tasks, `schedule=[{"cron": ...}]`,
    under ids of their own, and deletes those of labels that are gone. In a process of `taskiq
    scheduler` these are all that the broker's tasks do not have; elsewhere, where not all tasks may
    be imported, only those of tasks that are. What was added in another way stays.

    With a broker that is started, it works without its own startup(), as a retry middleware's
    `schedule_source` in a worker.

    Args:
        broker: The broker that sends the tasks; its database, retries and serializer are used.

    Raises:
        ConfigurationError: It is no SQLAlchemyBroker, or its models have no Schedule.
    """

    def __init__(self, broker: SQLAlchemyBroker) -> None:
        if not isinstance(broker, SQLAlchemyBroker):
            raise ConfigurationError(
                f"the schedule source takes a SQLAlchemyBroker, not {type(broker).__qualname__}"
            )
        table = broker.models.schedules_table
        if table is None:
            raise ConfigurationError(
                "the schedule source needs the model of its schedules: build_models(..., "
                "queue=True), or Models(..., Schedule=...) with a subclass of ScheduleMixin"
            )
        self._broker = broker
        self._schedules: Table = table
        self._table = broker.models.config.qualified(table.name)
        # What get_schedules() found, and what became of it since.
        self._found: dict[str, tuple[ScheduledTask, Times]] = {}
        self._looks: dict[str, _Look] = {}
        self._has_sent = False

    async def startup(self) -> None:
        """Opens the broker's connections, and stores the schedules of labels.

        Raises:
            ConfigurationError: A schedule in a label that cannot work.
            StorageError: PostgreSQL could not store them.
        """
        await self._broker.hold()
        try:
            await self._store_labelled()
        except BaseException:
            await self._broker.let_go()
            raise

    async def shutdown(self) -> None:
        """Closes the broker's connections, unless the broker itself is still in use."""
        await self._broker.let_go()

    async def add_schedule(self, schedule: ScheduledTask) -> None:
        """Stores a schedule, in place of one of the same id; committed on return.

        taskiq's schedule_by_cron(), schedule_by_interval() and schedule_by_time() call it. Stored
        again with the same times, it is due no sooner than before.

        Raises:
            ConfigurationError: An id, a time, a label or an argument that cannot work.
            InvalidTaskIdError: The task-id column cannot hold its task id.
            StorageError: PostgreSQL could not store it.
        """
        row = row_of_schedule(self._broker, schedule, is_labelled=False)
        [(statement, parameters)] = self._upsert.of([row])
        await self._fetch(statement, parameters, f"store schedule {row.schedule_id!r} in")

    async def delete_schedule(self, schedule_id: str) -> None:
        """Deletes a schedule; CreatedSchedule.unschedule() calls it.

        One that is not there, such as one that was due once and is sent, is no error. One of a
        label comes back at the next startup().

        Raises:
            ConfigurationError: No schedule can have this id.
            StorageError: PostgreSQL could not delete it.
        """
        check_schedule_id(schedule_id)
        purpose = f"delete schedule {schedule_id!r} from"
        if not await self._fetch(self._delete, {"id_sought": schedule_id}, purpose):
            logger.info("schedule %s is not there: it was sent or deleted before", schedule_id)

    async def get_schedules(self) -> list[ScheduledTask]:
        """All schedules; taskiq's scheduler asks once a minute, or as its --update-interval says.

        One that cannot be read is logged and left out. While a scheduler cannot reach PostgreSQL,
        it goes on with those that it has.

        Raises:
            StorageError: PostgreSQL could not be asked.
        """
        try:
            rows = await self._fetch(self._select, {}, "read the schedules in")
        except StorageError as exc:
            if not self._has_sent:
                raise
            logger.warning("the schedules are those of before: %s", exc)
            return [schedule for schedule, _ in self._found.values()]
        self._found = dict(self._read(rows))
        for schedule_id, look in list(self._looks.items()):
            schedule, times = self._found.get(schedule_id, (None, None))
            if schedule is not None and times == look.times and look.again is not None:
                schedule.interval = look.again
                continue
            del self._looks[schedule_id]
            if times is not None and times.time is not None:
                # Added again, after the loop has seen it due. The loop looks at no such schedule
                # twice, unless it was gone for a while.
                del self._found[schedule_id]
        return [schedule for schedule, _ in self._found.values()]

    def pre_send(self, task: ScheduledTask) -> None:
        """Notes for which tick a task is sent; taskiq's scheduler calls it."""
        self._has_sent = True
        schedule_id = task.schedule_id
        current, times = self._found.get(schedule_id, (task, times_of(task)))
        parameters: dict[str, Any] = {}
        minute = None
        if times.cron is not None:
            before = self._looks.get(schedule_id)
            minute = _due_minute(task, times.cron, before.minute if before else None)
            parameters = {"due_cron": times.cron, "due_minute": minute}
        elif times.time is not None:
            parameters = {"due_time": times.time}
        # taskiq's loop takes every look for a success, and reads `interval` whenever it wakes: so
        # it looks again soon, until it is known whose the tick was. Nobody tells us of a failure.
        again = _AGAIN if times.interval is None else min(_AGAIN, times.interval)
        self._looks[schedule_id] = _Look(times, again, minute)
        task.interval = current.interval = again

        def settle(sent: Sent) -> None:
            left = None
            if times.interval is not None:
                # Half a second early will do: see send_at_interval().
                left = max(_SECOND, timedelta(seconds=round(sent.seconds or 0)))
            self._looks[schedule_id] = _Look(times, left)
            task.interval = left
            if schedule_id in self._found:
                self._found[schedule_id][0].interval = left

        set_tick(Tick(schedule_id, times.kind, parameters, self._broker.settings, settle))

    def post_send(self, task: ScheduledTask) -> None:
        """Finds a scheduler that does not ask for the tick; else nothing is left to do.

        Raises:
            ConfigurationError: It sends by another broker, past the schedules' table.
        """
        if has_tick(task.schedule_id):
            set_tick(None)
            raise ConfigurationError(
                f"schedule {task.schedule_id!r} was sent by another broker than its source's, or "
                "without the label schedule_id, and so maybe by each scheduler: give "
                "TaskiqScheduler the source's broker"
            )

    async def _store_labelled(self) -> None:
        rows = labelled_rows(self._broker)
        parameters: dict[str, Any] = {
            name: [getattr(row, name) for row in rows] for name in ScheduleRow._fields
        }
        parameters["known"] = list(self._broker.get_all_tasks())
        parameters["is_complete"] = self._broker.is_scheduler_process
        await self._fetch(self._store, parameters, "store the schedules of labels in")

    def _read(self, rows: Sequence[Any]) -> Iterator[tuple[str, tuple[ScheduledTask, Times]]]:
        for each in rows:
            row = ScheduleRow(*each)
            try:
                schedule = schedule_of_row(self._broker.serializer, row)
            except Exception:
                text = "schedule %s of task %s in table %s cannot be read, and is left out"
                logger.exception(text, row.schedule_id, row.task_name, self._table)
            else:
                yield row.schedule_id, (schedule, times_of(schedule))

    async def _fetch(
        self, statement: Executable, parameters: Parameters, purpose: str
    ) -> Sequence[Any]:
        database = self._broker.runtime.database
        return await database.fetch(statement, parameters, f"{purpose} table {self._table}")

    @cached_property
    def _upsert(self) -> Upsert:
        return upsert_schedule(self._schedules)

    @cached_property
    def _store(self) -> Executable:
        return store_labelled(self._schedules)

    @cached_property
    def _select(self) -> Select[Any]:
        return select_schedules(self._schedules)

    @cached_property
    def _delete(self) -> Executable:
        return delete_schedule(self._schedules)


def utc_now() -> datetime:
    """What time it is, by the clock of taskiq's scheduler."""
    return datetime.now(UTC)


def _due_minute(task: ScheduledTask, cron: str, unsent: datetime | None) -> datetime:
    """The minute for which a task with a cron expression is sent now.

    By the clock that taskiq's loop goes by: if all schedulers took that of the database, those
    whose own differ would send one minute twice.
    """
    minute = utc_now().replace(second=0, microsecond=0)
    for each in (minute, minute - _MINUTE):  # which may have ended since the loop looked
        if is_cron_now(cron, task.cron_offset, each):
            return each
    return unsent or minute
