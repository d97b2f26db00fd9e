"""Tries again what failed for a reason that passes: a restart, a failover, a deadlock."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from math import inf
from typing import Final, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_before_delay, wait_random_exponential

from taskiq_sa_pg.database.errors import (
    is_transient,
    is_unknown_host,
    reason_of,
    remedy_of,
    sqlstate_of,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Seconds. Those who try again spread over the pause, which doubles up to this: a server that is
# back is noticed within it.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0

# Conflicts with other transactions, which no administrator needs to hear of.
_CONFLICTS: Final = "40"


class Retry:
    """Repeats attempts, and logs when an outage begins and when it is over.

    Args:
        timeout: For how many seconds after the start of the first attempt another one may be made
            and may last; 0 makes one attempt.
        attempt_timeout: How many seconds an attempt may take.
        is_passing: Whether an error is a reason to try again.
        on_retry: Called before every repetition.
        on_error: Called with everything that an attempt raised.
        place: The address of the server, for the log.
        unknown_host_timeout: The same as timeout where the host's name does not resolve, and
            nothing has succeeded yet: it is probably misspelled.
    """

    def __init__(
        self,
        timeout: float,
        attempt_timeout: float = inf,
        *,
        is_passing: Callable[[Exception], bool] = is_transient,
        on_retry: Callable[[], None] = lambda: None,
        on_error: Callable[[Exception], None] = lambda _: None,
        place: str = "",
        unknown_host_timeout: float = 5.0,
    ) -> None:
        self._timeout = timeout
        self._attempt_timeout = attempt_timeout
        self._is_passing = is_passing
        self._on_retry = on_retry
        self._on_error = on_error
        self._at = f" at {place}" if place else ""
        self._unknown_host_timeout = unknown_host_timeout
        self._has_succeeded = False
        self._outage_since: float | None = None

    async def run(
        self, attempt: Callable[[float], Awaitable[_T]], timeout: float | None = None
    ) -> _T:
        """What an attempt returns, made once or more. It is told how many seconds it may take.

        A `timeout` that is given is used instead of the usual one, and bounds the first attempt,
        too.

        Raises:
            Exception: What the attempt raised, where it does not pass or did not in time.
        """
        seconds = self._attempt_timeout
        if timeout is None:
            timeout = self._timeout
        elif timeout > 0:
            seconds = min(seconds, timeout)
        started_at = asyncio.get_running_loop().time()
        try:
            result = await attempt(seconds)
        except Exception as exc:
            self._on_error(exc)
            if timeout <= 0 or not self._is_passing(exc):
                raise
            if is_unknown_host(exc) and not self._has_succeeded:
                timeout = min(timeout, self._unknown_host_timeout)
            self._note_outage(exc, timeout)
            deadline = started_at + timeout
            if asyncio.get_running_loop().time() >= deadline:
                raise
            reason = exc
        else:
            self._note_success()
            return result
        return await self._repeat(attempt, deadline, reason)

    async def _repeat(
        self, attempt: Callable[[float], Awaitable[_T]], deadline: float, reason: Exception
    ) -> _T:
        # Not for the first attempt: tenacity takes longer than a small statement.
        loop = asyncio.get_running_loop()
        repeat = AsyncRetrying(
            retry=retry_if_exception(lambda e: isinstance(e, Exception) and self._is_passing(e)),
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
            stop=stop_before_delay(deadline - loop.time()),
            reraise=True,
        )

        async def counted() -> _T:
            nonlocal reason
            self._on_retry()
            seconds = min(self._attempt_timeout, deadline - loop.time())
            try:
                return await attempt(seconds)
            except Exception as exc:  # noqa: BLE001 - it is raised below
                self._on_error(exc)
                # What the end of all attempts has cut short says less than what was before it.
                if not (isinstance(exc, TimeoutError) and seconds < self._attempt_timeout):
                    reason = exc
            raise reason

        result: _T = await repeat(counted)
        self._note_success()
        return result

    def _note_outage(self, exc: Exception, timeout: float) -> None:
        if self._outage_since is None and not (sqlstate_of(exc) or "").startswith(_CONFLICTS):
            self._outage_since = asyncio.get_running_loop().time()
            remedy = remedy_of(exc)
            logger.warning(
                "PostgreSQL%s: %s; trying again for up to %g s%s",
                *(self._at, reason_of(exc), timeout, f"; {remedy}" if remedy else ""),
            )

    def _note_success(self) -> None:
        self._has_succeeded = True
        if self._outage_since is not None:
            seconds = asyncio.get_running_loop().time() - self._outage_since
            self._outage_since = None
            logger.info("PostgreSQL%s: recovered after %.1f s", self._at, seconds)
