"""How long results are kept, in seconds since their completion; no I/O."""

import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from taskiq_sa_pg.exceptions import ConfigurationError

logger = logging.getLogger(__name__)

Seconds = float | timedelta

# Of successes and of failures, by is_err.
_LABELS: Final = ("result_ttl", "failure_ttl")

# Three thousand years: within PostgreSQL's calendar and its exact arithmetic.
_MAX_SECONDS: Final = 1e11

# Labels that mean "for ever": brokers may carry None as text.
_FOR_EVER: Final = frozenset({"none", "null", ""})

_MAX_COMPLAINTS: Final = 100


class Retention:
    """Determines when a result expires, from its outcome and the labels of its task.

    The label `result_ttl` applies to successes and `failure_ttl` to failures: a number of seconds,
    or None, which keeps the result for ever. An invalid label is logged, once for each value, and
    the backend's setting is used.
    """

    def __init__(
        self, result_ttl: Seconds | None = None, failure_ttl: Seconds | None = None
    ) -> None:
        self._own: Final = tuple(map(check_seconds, _LABELS, (result_ttl, failure_ttl)))
        self._complained_of: set[tuple[str, str]] = set()

    def seconds_for(self, is_err: bool, labels: Mapping[str, Any]) -> float | None:
        """Seconds after which a result with this outcome and these labels expires; None: never."""
        own = self._own[is_err]
        if not labels:
            return own
        name = _LABELS[is_err]
        try:  # labels can be of any type
            return _parse(labels[name]) if name in labels else own
        except Exception as exc:  # noqa: BLE001 - anyone's __float__
            self._complain(name, exc)
            return own

    def _complain(self, name: str, exc: Exception) -> None:
        complaint = name, str(exc)
        if complaint not in self._complained_of and len(self._complained_of) < _MAX_COMPLAINTS:
            self._complained_of.add(complaint)
            logger.error("label %s is ignored: %s", name, exc)


def check_seconds(name: str, value: Seconds | None) -> float | None:
    """Returns a duration in seconds, at most three thousand years; None stays None.

    Raises:
        ConfigurationError: It is not a number above 0.
    """
    if value is None:
        return None
    try:
        return _to_seconds(value)
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(
            f"{name} must be a timedelta or a number of seconds above 0, or None, not {value!r}"
        ) from exc


def _parse(label: Any) -> float | None:
    if label is None or (isinstance(label, str) and label.strip().lower() in _FOR_EVER):
        return None
    return _to_seconds(float(label) if isinstance(label, str) else label)


def _to_seconds(value: Any) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.100} is not a number of seconds")
    seconds = float(min(value, _MAX_SECONDS))
    if not seconds > 0:  # also for NaN
        raise ValueError(f"{value!r:.100} is not a number of seconds above 0")
    return seconds


KEEP_FOR_EVER: Final = Retention()
