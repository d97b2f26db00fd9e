"""Cron expressions as taskiq's scheduler evaluates them: whether and when they are due."""

from datetime import UTC, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo

import pycron
from pydantic import TypeAdapter, ValidationError

_TIMEDELTA: Final = TypeAdapter(timedelta)

_MINUTE: Final = timedelta(minutes=1)
_DAY: Final = timedelta(days=1)

# How far next_cron() searches.
_LONGEST: Final = timedelta(days=366)

# The errors of an invalid expression or offset.
CRON_ERRORS: Final = (ValueError, LookupError, ArithmeticError, OSError)

Offset = str | timedelta | None


def offset_of(stored: str | None) -> Offset:
    """The offset of a cron expression, from its serialized form in the schedule's message."""
    # Before 0.13, taskiq parses a serialized timedelta as the name of a zone.
    try:
        return None if stored is None else _TIMEDELTA.validate_python(stored)
    except ValidationError:
        return stored


def is_cron_now(cron: str, offset: Offset, minute: datetime) -> bool:
    """Whether a cron expression is due in a minute of UTC, as taskiq's scheduler evaluates it.

    Raises:
        ValueError: The expression is invalid.
        ArithmeticError: The expression is invalid, such as "*/0 * * * *".
        LookupError: The offset is not the name of a time zone.
    """
    is_now: bool = pycron.is_now(cron, _to_local(minute, offset))
    return is_now


def next_cron(cron: str, offset: Offset, start: datetime) -> datetime | None:
    """The first minute, from `start` on in UTC, in which a cron expression is due.

    None if that is more than a year away. It tests days, then hours, then minutes: some hundred
    tests for a yearly expression.

    Raises:
        ValueError: The expression or the offset is invalid.
        ArithmeticError: The expression is invalid, such as "*/0 * * * *".
        LookupError: The offset is not the name of a time zone.
    """
    minutes, hours, *days = cron.split(" ")
    on_day, in_hour = " ".join(["*", "*", *days]), f"* {hours} * * *"
    minute = start
    while minute - start <= _LONGEST:
        local = _to_local(minute, offset)
        if not pycron.is_now(on_day, local):
            minute = _next_day(local, offset)
        elif not pycron.is_now(in_hour, local):
            minute += _MINUTE * (60 - local.minute)
        elif not pycron.is_now(f"{minutes} * * * *", local):
            minute += _MINUTE
        else:
            return minute
    return None


def _to_local(minute: datetime, offset: Offset) -> datetime:
    if isinstance(offset, timedelta):
        return minute + offset
    return minute.astimezone(ZoneInfo(offset)) if offset else minute


def _next_day(local: datetime, offset: Offset) -> datetime:
    """The beginning of the next local day, in UTC."""
    midnight = datetime.combine(local.date() + _DAY, time(), local.tzinfo)
    return midnight - offset if isinstance(offset, timedelta) else midnight.astimezone(UTC)
