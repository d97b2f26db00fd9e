"""SQLAlchemyScheduleSource: stores schedules in a table of the broker's database."""

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
from taskiq_sa_pg.database import Parameters, repr_at
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

# When a tick that could not be sent is retried. Whole seconds, as taskiq's intervals are.
_AGAIN: Final = timedelta(seconds=5)

_SECOND: Final = timedelta(seconds=1)
_MINUTE: Final = timedelta(minutes=1)


@dataclass(slots=True)
class _Look:
    """The state of a schedule since taskiq's loop last found it due.

    Attributes:
        times: The schedule's times then.
        again: The delay until the loop has to check again; None leaves it to the schedule.
        minute: The minute of a cron expression whose task may not have been sent.
    """

    times: Times
    again: timedelta | None
    minute: datetime | None = None


class SQLAlchemyScheduleSource(ScheduleSource):
    """Keeps schedules in the broker's database: `<table_name>_schedules`.

        source = SQLAlchemyScheduleSource(broker)
        scheduler = TaskiqScheduler(broker, [source])

    Schedules survive restarts. Any number of schedulers (`taskiq scheduler app:scheduler`) may run,
    and each tick is sent once. A cron expression is sent in its minute, and skipped if no scheduler
    ran then. An interval is sent when it has passed since its last tick, from any scheduler. A
    one-time schedule is sent at its time, or later if no scheduler ran.

    startup() stores the schedules in the labels of the broker's tasks, `schedule=[{"cron": ...}]`,
    with generated ids unless they have a `schedule_id`, and deletes schedules whose labels no
    longer exist. A process of `taskiq scheduler` deletes all of these. Other processes may not have
    imported all tasks, so they delete only those of tasks that they know. Schedules that were added
    in another way stay.

    With a started broker, it works without its own startup(), for example as a retry middleware's
    `schedule_source` in a worker.

    Args:
        broker: The broker that sends the tasks; its database, retries and serializer are used.

    Raises:
        ConfigurationError: It is not a SQLAlchemyBroker, or its models have no Schedule.
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
        # The result of the last get_schedules(), and the state of due schedules since.
        self._found: dict[str, tuple[ScheduledTask, Times]] = {}
        self._looks: dict[str, _Look] = {}
        self._has_sent = False

    def __repr__(self) -> str:
        return repr_at(type(self).__qualname__, self._table, self._broker.place)

    async def startup(self) -> None:
        """Opens the broker's connections, and stores the schedules from labels.

        Raises:
            ConfigurationError: A schedule in a label is invalid.
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
        """Stores a schedule, or replaces the one of the same id; it is committed on return.

        taskiq's schedule_by_cron(), schedule_by_interval() and schedule_by_time() call it. A
        schedule that is stored again with the same times keeps its last tick.

        Raises:
            ConfigurationError: An id, a time, a label or an argument is invalid.
            InvalidTaskIdError: The task-id column cannot hold its task id.
            StorageError: PostgreSQL could not store it.
        """
        row = row_of_schedule(self._broker, schedule, is_labelled=False)
        [(statement, parameters)] = self._upsert.of([row])
        await self._fetch(statement, parameters, f"store schedule {row.schedule_id!r} in")

    async def delete_schedule(self, schedule_id: str) -> None:
        """Deletes a schedule; CreatedSchedule.unschedule() calls it.

        If the schedule does not exist, for example because it was sent once, nothing happens. A
        schedule from a label is stored again at the next startup().

        Raises:
            ConfigurationError: The id is invalid.
            StorageError: PostgreSQL could not delete it.
        """
        check_schedule_id(schedule_id)
        purpose = f"delete schedule {schedule_id!r} from"
        if not await self._fetch(self._delete, {"id_sought": schedule_id}, purpose):
            logger.info("schedule %s does not exist: it was sent or deleted before", schedule_id)

    async def get_schedules(self) -> list[ScheduledTask]:
        """All schedules; taskiq's scheduler calls it once a minute, or every --update-interval.

        Schedules that cannot be read are logged and skipped. If PostgreSQL cannot be reached, a
        scheduler that has sent tasks keeps the schedules that it has.

        Raises:
            StorageError: PostgreSQL could not be read.
        """
        try:
            rows = await self._fetch(self._select, {}, "read the schedules in")
        except StorageError as exc:
            if not self._has_sent:
                raise
            logger.warning("the schedules that were read before stay in use: %s", exc)
            return [schedule for schedule, _ in self._found.values()]
        self._found = dict(self._read(rows))
        for schedule_id, look in list(self._looks.items()):
            schedule, times = self._found.get(schedule_id, (None, None))
            if schedule is not None and times == look.times and look.again is not None:
                schedule.interval = look.again
                continue
            del self._looks[schedule_id]
            if times is not None and times.time is not None:
                # Added again after the loop found it due. The loop checks a one-time schedule only
                # once, unless it was missing for a while.
                del self._found[schedule_id]
        return [schedule for schedule, _ in self._found.values()]

    def pre_send(self, task: ScheduledTask) -> None:
        """Records the tick for which a task is sent; taskiq's scheduler calls it."""
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
        # taskiq's loop assumes that each tick was sent, and reports no failure to us. It reads
        # `interval` whenever it wakes: so let it check again soon, until the outcome is known.
        again = _AGAIN if times.interval is None else min(_AGAIN, times.interval)
        self._looks[schedule_id] = _Look(times, again, minute)
        task.interval = current.interval = again

        def settle(sent: Sent) -> None:
            left = None
            if times.interval is not None:
                # Up to half a second early is accepted: see send_at_interval().
                left = max(_SECOND, timedelta(seconds=round(sent.seconds or 0)))
            self._looks[schedule_id] = _Look(times, left)
            task.interval = left
            if schedule_id in self._found:
                self._found[schedule_id][0].interval = left

        set_tick(Tick(schedule_id, times.kind, parameters, self._broker.settings, settle))

    def post_send(self, task: ScheduledTask) -> None:
        """Checks that the scheduler has sent the tick through the source's broker.

        Raises:
            ConfigurationError: It sends with another broker, which bypasses the schedules' table.
        """
        if has_tick(task.schedule_id):
            set_tick(None)
            raise ConfigurationError(
                f"schedule {task.schedule_id!r} was not sent by its source's broker, or without "
                "the label schedule_id, so several schedulers may send it: create TaskiqScheduler "
                "with the source's broker"
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
                text = "schedule %s of task %s in table %s cannot be read, and is skipped"
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
    """The time by the clock of taskiq's scheduler."""
    return datetime.now(UTC)


def _due_minute(task: ScheduledTask, cron: str, unsent: datetime | None) -> datetime:
    """The minute for which a task with a cron expression is sent now.

    It uses the clock of taskiq's loop: with the database's clock, schedulers with different clocks
    would send one minute twice.
    """
    minute = utc_now().replace(second=0, microsecond=0)
    for each in (minute, minute - _MINUTE):  # it may have ended since the loop checked
        if is_cron_now(cron, task.cron_offset, each):
            return each
    return unsent or minute
