"""Tries again what failed for a reason that passes: a restart, a failover, a deadlock."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from taskiq_sa_pg.database.errors import is_transient, reason_of, sqlstate_of

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

    An attempt is repeated until `timeout` seconds after its start; never for 0. `on_retry` hears
    of every repetition, and `on_error` of everything that an attempt raised.
    """

    def __init__(
        self,
        timeout: float,
        on_retry: Callable[[], None] = lambda: None,
        on_error: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._timeout = timeout
        self._on_retry = on_retry
        self._on_error = on_error
        self._outage_since: float | None = None

    async def run(self, attempt: Callable[[], Awaitable[_T]], timeout: float | None = None) -> _T:
        """What an attempt returns, made once or more; `timeout` instead of the usual.

        Raises:
            Exception: What the attempt raised, where it does not pass or did not in time.
        """
        timeout = self._timeout if timeout is None else timeout
        started_at = asyncio.get_running_loop().time()
        try:
            result = await attempt()
        except Exception as exc:
            self._on_error(exc)
            if timeout <= 0 or not is_transient(exc):
                raise
            self._note_outage(exc, timeout)
        else:
            if self._outage_since is not None:
                self._note_success()
            return result
        return await self._repeat(attempt, started_at + timeout)

    async def _repeat(self, attempt: Callable[[], Awaitable[_T]], deadline: float) -> _T:
        # Not for the first attempt: tenacity takes longer than a small statement.
        repeat = AsyncRetrying(
            retry=retry_if_exception(lambda exc: isinstance(exc, Exception) and is_transient(exc)),
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
            stop=stop_after_delay(deadline - asyncio.get_running_loop().time()),
            reraise=True,
        )

        async def counted() -> _T:
            self._on_retry()
            try:
                return await attempt()
            except Exception as exc:
                self._on_error(exc)
                raise

        result: _T = await repeat(counted)
        self._note_success()
        return result

    def _note_outage(self, exc: Exception, timeout: float) -> None:
        if self._outage_since is None and not (sqlstate_of(exc) or "").startswith(_CONFLICTS):
            self._outage_since = asyncio.get_running_loop().time()
            logger.warning("PostgreSQL: %s; trying again for up to %g s", reason_of(exc), timeout)

    def _note_success(self) -> None:
        if self._outage_since is not None:
            seconds = asyncio.get_running_loop().time() - self._outage_since
            self._outage_since = None
            logger.info("PostgreSQL: recovered after %.1f s", seconds)
