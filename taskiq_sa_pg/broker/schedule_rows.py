"""Converts schedules to rows and back, with checks; finds the schedules in tasks' labels."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

from taskiq import BrokerMessage, ScheduledTask
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.decor import AsyncTaskiqDecoratedTask

from taskiq_sa_pg.broker.broker import SQLAlchemyBroker
from taskiq_sa_pg.broker.cron import CRON_ERRORS, is_cron_now, offset_of
from taskiq_sa_pg.broker.sender import row_of
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.models import flaw_of_key, shortened
from taskiq_sa_pg.statements import ScheduleRow

logger = logging.getLogger(__name__)

# The serialized fields; the others are columns.
_SERIALIZED: Final = {"args", "kwargs", "labels", "task_id", "cron_offset"}

# The task's labels that are not sent, as in taskiq's kicker.
_NOT_SENT: Final = {"schedule", "types_of_exceptions"}

_DAY: Final = datetime(2000, 1, 1, tzinfo=UTC)


class Times(NamedTuple):
    """When a schedule is due: one of the three."""

    cron: str | None
    interval: timedelta | None
    time: datetime | None

    @property
    def kind(self) -> Literal["cron", "interval", "time"]:
        """The one that is set."""
        return "cron" if self.cron is not None else "interval" if self.interval else "time"


def times_of(schedule: ScheduledTask) -> Times:
    """The times of a schedule; a time without a zone is UTC, as in taskiq."""
    interval, time = schedule.interval, schedule.time
    if isinstance(interval, int):
        interval = timedelta(seconds=interval)
    if time is not None and time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return Times(schedule.cron, interval, time)


def check_schedule_id(schedule_id: object) -> None:
    """Checks a schedule id.

    Raises:
        ConfigurationError: It is not a str, it is empty, or PostgreSQL cannot store it.
    """
    if not isinstance(schedule_id, str) or not schedule_id:
        raise ConfigurationError(f"a schedule id must be a non-empty str, not {schedule_id!r}")
    flaw = flaw_of_key(schedule_id)
    if flaw:
        raise ConfigurationError(f"schedule id {shortened(schedule_id)!r} {flaw}")


def row_of_schedule(
    broker: SQLAlchemyBroker, schedule: ScheduledTask, *, is_labelled: bool
) -> ScheduleRow:
    """Converts a schedule to a row, and checks that the broker can send its task.

    Raises:
        ConfigurationError: An id, a time, a label or an argument is invalid.
        InvalidTaskIdError: The task-id column cannot hold its task id.
    """
    check_schedule_id(schedule.schedule_id)
    times = times_of(schedule)
    what = f"schedule {schedule.schedule_id!r} of task {schedule.task_name!r}"
    if sum(each is not None for each in times) != 1:
        raise ConfigurationError(
            f"{what} must have exactly one of cron, interval and time: create a schedule for each"
        )
    if times.cron is not None:
        try:
            is_cron_now(times.cron, schedule.cron_offset, _DAY)
        except CRON_ERRORS as exc:
            raise ConfigurationError(f"{what}: cron expression {times.cron!r}: {exc}") from exc
    task_id = schedule.task_id if schedule.task_id is not None else broker.id_generator()
    name, labels = schedule.task_name, schedule.labels
    row_of(
        broker.settings, BrokerMessage(task_id=task_id, task_name=name, message=b"", labels=labels)
    )
    try:
        # As taskiq serializes a message.
        values = schedule.model_dump(mode="json", include=_SERIALIZED)
        message = broker.serializer.dumpb(values)
    except Exception as exc:
        raise ConfigurationError(f"{what} cannot be serialized: {exc}") from exc
    return ScheduleRow(schedule.schedule_id, name, *times, message, is_labelled)


def schedule_of_row(serializer: TaskiqSerializer, row: ScheduleRow) -> ScheduledTask:
    """Converts a row to a schedule."""
    stored = serializer.loadb(row.message)
    values = {name: stored[name] for name in _SERIALIZED}
    values["cron_offset"] = offset_of(values["cron_offset"])
    return ScheduledTask(
        schedule_id=row.schedule_id,
        task_name=row.task_name,
        cron=row.cron,
        interval=row.interval,
        time=row.time,
        **values,
    )


def labelled_rows(broker: SQLAlchemyBroker) -> list[ScheduleRow]:
    """The schedules in the labels of a broker's tasks.

    Raises:
        ConfigurationError: A schedule is invalid, or two have the same id.
    """
    rows: dict[str, ScheduleRow] = {}
    for name, task in broker.get_all_tasks().items():
        for schedule in _schedules_of(broker, name, task):
            if schedule.schedule_id in rows:
                raise ConfigurationError(
                    f"two schedules in labels have the schedule_id {schedule.schedule_id!r}"
                )
            row = row_of_schedule(broker, schedule, is_labelled=True)
            rows[row.schedule_id] = row
    return list(rows.values())


def _schedules_of(
    broker: SQLAlchemyBroker, task_name: str, task: AsyncTaskiqDecoratedTask[Any, Any]
) -> Iterator[ScheduledTask]:
    labels: Mapping[str, Any] = task.labels
    given = [each for each in labels.get("schedule") or [] if {*each} & {*Times._fields}]
    if given and getattr(task.broker, "settings", None) is not broker.settings:
        text = "the schedules in the labels of task %s are ignored: it has another broker, %s"
        logger.warning(text, task_name, task.broker)
        return
    own = {name: value for name, value in labels.items() if name not in _NOT_SENT}
    alike: Counter[str] = Counter()
    for each in given:
        try:
            schedule = ScheduledTask(
                task_name=task_name,
                labels=own | each.get("labels", {}),
                args=each.get("args", []),
                kwargs=each.get("kwargs", {}),
                cron_offset=each.get("cron_offset"),
                **{name: each.get(name) for name in Times._fields},
            )
        except ValueError as exc:
            raise ConfigurationError(f"a schedule in the labels of {task_name!r}: {exc}") from exc
        when = _when(schedule)
        number = alike[when]
        alike[when] += 1
        schedule.schedule_id = each.get("schedule_id") or _id_of(task_name, when, number)
        yield schedule


def _when(schedule: ScheduledTask) -> str:
    offset = schedule.cron_offset
    return json.dumps([*map(str, times_of(schedule)), None if offset is None else str(offset)])


def _id_of(task_name: str, when: str, number: int) -> str:
    # Without the arguments: if only these change, a schedule keeps its last tick.
    text = json.dumps([task_name, when, number])
    return f"{task_name[:100]}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
