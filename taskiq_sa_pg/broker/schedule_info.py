"""Descriptions of schedules. Messages are read only if they are JSON."""

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from taskiq_sa_pg.broker.cron import CRON_ERRORS, next_cron, offset_of
from taskiq_sa_pg.statements import ListedSchedule

_MINUTE: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class ScheduleInfo:
    """A schedule: when its task is sent, and with what arguments and labels.

    Times are in UTC. Exactly one of cron, interval and time is set. cron_offset, args, kwargs and
    labels are None if the broker's serializer does not write JSON: nothing is unpickled.

    Attributes:
        schedule_id: The schedule id.
        task_name: The task that is sent.
        cron: The cron expression.
        cron_offset: The time zone of the expression, or its offset from UTC, as text.
        interval: The time between two ticks.
        time: When a one-time schedule is due.
        last_tick: The last tick for which the task was sent; None if it never was.
        next_due: When it is due next, possibly in the past if no scheduler ran. None if it is
            never due again or if that is unknown: a cron expression with an unreadable time zone,
            or due in more than a year; an interval that ends after the year 9999.
        is_labelled: Whether it comes from the labels of its task.
        args: The positional arguments.
        kwargs: The keyword arguments.
        labels: The labels of the task that is sent.
    """

    schedule_id: str
    task_name: str
    cron: str | None
    cron_offset: str | None
    interval: timedelta | None
    time: datetime | None
    last_tick: datetime | None
    next_due: datetime | None
    is_labelled: bool
    args: list[Any] | None
    kwargs: dict[str, Any] | None
    labels: dict[str, Any] | None


def info_of_row(row: ListedSchedule) -> ScheduleInfo:
    """Converts a row to a ScheduleInfo."""
    stored = _json_of(row.message)
    offset, args, kwargs, labels = map(stored.get, ("cron_offset", "args", "kwargs", "labels"))
    cron_offset = offset if isinstance(offset, str) else None
    is_known = "cron_offset" in stored and offset in (None, cron_offset)
    return ScheduleInfo(
        schedule_id=row.schedule_id,
        task_name=row.task_name,
        cron=row.cron,
        cron_offset=cron_offset,
        interval=row.interval,
        time=_in_utc(row.time),
        last_tick=_in_utc(row.last_tick),
        next_due=_next_due(row, cron_offset) if is_known or row.cron is None else None,
        is_labelled=row.is_labelled,
        args=args if isinstance(args, list) else None,
        kwargs=kwargs if isinstance(kwargs, dict) else None,
        labels=labels if isinstance(labels, dict) else None,
    )


def _json_of(message: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(message)
        if isinstance(found, dict):
            return found
    return {}


def _next_due(row: ListedSchedule, cron_offset: str | None) -> datetime | None:
    last = _in_utc(row.last_tick)
    if row.time is not None:
        return None if last else _in_utc(row.time)
    if row.interval is not None:
        # The first tick is due when it is stored.
        with suppress(OverflowError):  # after the year 9999
            return _in_utc(row.created_at) if last is None else last + row.interval
        return None
    if row.cron is None:
        return None
    start = datetime.now(UTC).replace(second=0, microsecond=0)
    if last is not None:
        start = max(start, last + _MINUTE)
    try:
        return next_cron(row.cron, offset_of(cron_offset), start)
    except CRON_ERRORS:
        return None  # another program has written the row


def _in_utc(time: datetime | None) -> datetime | None:
    # psycopg returns times in the session's time zone.
    return None if time is None else time.astimezone(UTC)
