"""The moment that an option --since means."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from taskiq_sa_pg.exceptions import ConfigurationError

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_since(text: str) -> datetime:
    """The moment that "2h", "7d", "2026-11-23" or "2026-11-23T08:30+01:00" means."""
    try:
        if match := re.fullmatch(r"(\d+)([smhdw])", text):
            return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"--since {text}: say 30s, 15m, 2h, 7d, 1w or a date such as 2026-11-23T08:30"
        ) from None
