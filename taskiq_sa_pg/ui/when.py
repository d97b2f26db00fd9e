"""When a schedule is due, in words."""

import re
from collections.abc import Callable
from typing import Final

from taskiq_sa_pg.broker import ScheduleInfo
from taskiq_sa_pg.ui.formatting import duration, plural

_DAYS: Final = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_MONTHS: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

# More times per day make no readable sentence.
_MOST_TIMES: Final = 4


def in_words(schedule: ScheduleInfo) -> str:
    """Returns for example "every 10 min" or "at 06:30 on Monday, Europe/Berlin".

    Returns "" if that would be too long, or if the schedule is due only once.
    """
    if schedule.interval is not None:
        return f"every {duration(schedule.interval.total_seconds())}"
    if schedule.cron is None:
        return ""
    words = cron_in_words(schedule.cron)
    return f"{words}, {schedule.cron_offset or 'UTC'}" if words else ""


def cron_in_words(cron: str) -> str:
    """A cron expression in words; "" if that would be too long."""
    fields = cron.split()
    if len(fields) != 5:
        return ""
    time, day = _time_in_words(*fields[:2]), _day_in_words(*fields[2:])
    if time is None or day is None:
        return ""
    if time.startswith("at") and not day:
        return f"{time} every day"
    return f"{time} {day}".strip()


def _time_in_words(minute: str, hour: str) -> str | None:
    if hour == "*":
        return _minute_in_words(minute)
    if not minute.isdigit():
        return None
    if step := _step(hour):
        past = "" if minute == "0" else f", {plural(int(minute), 'minute')} past"
        return f"every {plural(step, 'hour')}{past}"
    hours = hour.split(",")
    if not all(each.isdigit() for each in hours) or len(hours) > _MOST_TIMES:
        return None
    return "at " + _listed([f"{int(each):02}:{int(minute):02}" for each in hours])


def _minute_in_words(minute: str) -> str | None:
    if minute == "*":
        return "every minute"
    if step := _step(minute):
        return f"every {plural(step, 'minute')}"
    if not minute.isdigit():
        return None
    return f"{plural(int(minute), 'minute')} past every hour" if int(minute) else "every hour"


def _day_in_words(day: str, month: str, weekday: str) -> str | None:
    if "*" not in (day, weekday):
        return None
    parts = [
        _named(weekday, _weekday, "on {}"),
        _named(day, lambda each: each if each.isdigit() else None, "on day {} of the month"),
        _named(month, _month, "in {}"),
    ]
    return None if None in parts else " ".join(filter(None, parts))


def _named(field: str, name_of: Callable[[str], str | None], text: str) -> str | None:
    if field == "*":
        return ""
    names = []
    for each in field.split(","):
        ends = [name_of(end) for end in each.split("-")]
        if None in ends or len(ends) > 2:
            return None
        names.append(" to ".join(filter(None, ends)))
    return text.format(_listed(names))


def _weekday(text: str) -> str | None:
    if text.isdigit():
        return _DAYS[int(text)] if int(text) < len(_DAYS) else None
    return next((d for d in _DAYS if text.lower() in (d.lower(), d.lower()[:3])), None)


def _month(text: str) -> str | None:
    return _MONTHS[int(text) - 1] if text.isdigit() and 0 < int(text) <= len(_MONTHS) else None


def _step(field: str) -> int | None:
    found = re.fullmatch(r"\*/([1-9]\d?)", field)
    return int(found[1]) if found else None


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
