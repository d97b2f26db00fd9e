"""Moments and durations in options."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from taskiq_sa_pg.exceptions import ConfigurationError

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

# No table of ours is older.
_LONGEST: Final = timedelta(days=36_500)


def parse_since(text: str) -> datetime:
    """The moment that "2h", "7d", "2026-11-23" or "2026-11-23T08:30+01:00" means."""
    try:
        if (duration := _duration(text)) is not None:
            return datetime.now(UTC) - duration
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"--since {text}: use 30s, 15m, 2h, 7d, 1w or a date such as 2026-11-23T08:30"
        ) from None


def parse_duration(option: str, text: str) -> timedelta:
    """The time that "30s", "15m", "2h", "7d" or "1w" means; not 0, not 100 years.

    Raises:
        ConfigurationError: The text is not a duration in these limits.
    """
    try:
        duration = _duration(text)
    except OverflowError:
        duration = None
    if not duration or duration > _LONGEST:
        raise ConfigurationError(
            f"{option} {text}: use 30s, 15m, 2h, 7d or 1w; more than 0, at most {_LONGEST.days}d"
        )
    return duration


def _duration(text: str) -> timedelta | None:
    match = re.fullmatch(r"(\d+)([smhdw])", text)
    return timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else None
