"""Retries after transient errors: a restart, a failover, a deadlock."""

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

# Seconds. A pause is random, up to a bound that doubles from the first to the longest; so clients
# do not retry at the same moment, and notice within the longest pause that a server is back.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0

# Conflicts with other transactions, which are not logged as an outage.
_CONFLICTS: Final = "40"


class Retry:
    """Retries attempts, and logs the begin and the end of an outage.

    Args:
        timeout: Seconds from the start of the first attempt in which retries may start and run; 0
            makes one attempt.
        attempt_timeout: Seconds that one attempt may take.
        should_retry: Whether an error is transient.
        on_retry: Called before every retry.
        on_error: Called with every exception of an attempt.
        place: Returns the server's host and port, for the log; empty if they are not known.
        unknown_host_timeout: Replaces a longer timeout if the host name does not exist and no
            attempt has succeeded yet: the name is probably misspelled.
    """

    def __init__(
        self,
        timeout: float,
        attempt_timeout: float = inf,
        *,
        should_retry: Callable[[Exception], bool] = is_transient,
        on_retry: Callable[[], None] = lambda: None,
        on_error: Callable[[Exception], None] = lambda _: None,
        place: Callable[[], str] = str,
        unknown_host_timeout: float = 5.0,
    ) -> None:
        self._timeout = timeout
        self._attempt_timeout = attempt_timeout
        self._should_retry = should_retry
        self._on_retry = on_retry
        self._on_error = on_error
        self._place = place
        self._unknown_host_timeout = unknown_host_timeout
        self._has_succeeded = False
        self._outage_since: float | None = None

    async def run(
        self, attempt: Callable[[float], Awaitable[_T]], timeout: float | None = None
    ) -> _T:
        """Makes one or more attempts and returns the result of the last.

        Args:
            attempt: Called with the seconds that it may take.
            timeout: Overrides that of the constructor, and bounds the first attempt as well.

        Raises:
            Exception: The attempt's error, if it is permanent or the timeout has passed.
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
            if timeout <= 0 or not self._should_retry(exc):
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
        # Not used for the first attempt: tenacity takes longer than a small statement.
        loop = asyncio.get_running_loop()
        repeat = AsyncRetrying(
            retry=retry_if_exception(lambda e: isinstance(e, Exception) and self._should_retry(e)),
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
                # If the overall deadline cut this attempt short, the error before says more.
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
                "PostgreSQL%s: %s; retrying for up to %g s%s",
                *(self._at(), reason_of(exc), timeout, f"; {remedy}" if remedy else ""),
            )

    def _note_success(self) -> None:
        self._has_succeeded = True
        if self._outage_since is not None:
            seconds = asyncio.get_running_loop().time() - self._outage_since
            self._outage_since = None
            logger.info("PostgreSQL%s: recovered after %.1f s", self._at(), seconds)

    def _at(self) -> str:
        place = self._place()
        return f" at {place}" if place else ""
