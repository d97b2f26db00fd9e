"""Cron expressions as taskiq's scheduler sees them: whether one is due, and when it will be."""

from datetime import UTC, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo

import pycron
from pydantic import TypeAdapter, ValidationError

_TIMEDELTA: Final = TypeAdapter(timedelta)

_MINUTE: Final = timedelta(minutes=1)
_DAY: Final = timedelta(days=1)

# How far next_cron() looks.
_LONGEST: Final = timedelta(days=366)

# What an expression, or an offset, raises that is none.
CRON_ERRORS: Final = (ValueError, LookupError, ArithmeticError, OSError)

Offset = str | timedelta | None


def offset_of(stored: str | None) -> Offset:
    """The offset of a cron expression, as its schedule's message has it."""
    # Before 0.13, taskiq takes a time that was serialized for the name of a zone.
    try:
        return None if stored is None else _TIMEDELTA.validate_python(stored)
    except ValidationError:
        return stored


def is_cron_now(cron: str, offset: Offset, minute: datetime) -> bool:
    """Whether a cron expression is due in a minute of UTC, as taskiq's scheduler sees it.

    Raises:
        ValueError: It is none.
        ArithmeticError: It is none, such as "*/0 * * * *".
        LookupError: The offset is the name of no time zone.
    """
    is_now: bool = pycron.is_now(cron, _to_local(minute, offset))
    return is_now


def next_cron(cron: str, offset: Offset, start: datetime) -> datetime | None:
    """The first minute from a minute of UTC on in which a cron expression is due.

    None where that is more than a year away. It looks at days, then hours, then minutes, which are
    some hundred for what is due once a year.

    Raises:
        ValueError: It is none, or an offset that cannot be.
        ArithmeticError: It is none, such as "*/0 * * * *".
        LookupError: The offset is the name of no time zone.
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
    """When the next day begins there, in UTC."""
    midnight = datetime.combine(local.date() + _DAY, time(), local.tzinfo)
    return midnight - offset if isinstance(offset, timedelta) else midnight.astimezone(UTC)
