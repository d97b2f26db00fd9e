"""Tries again what failed for a reason that passes: a restart, a failover, a deadlock."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from taskiq_sa_pg.faults import is_transient, reason_of, sqlstate_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Seconds. Those who try again spread over the pause, which doubles up to this: a server that is
# back is noticed within it.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0

# Conflicts with other transactions, which no administrator needs to hear of.
_CONFLICTS: Final = "40"


class Retries:
    """Repeats attempts, and logs when trouble begins and when it is over.

    Args:
        timeout: How many seconds after its start an attempt is repeated; 0 for never.
        on_retry: Called for every repetition.

    Attributes:
        is_in_trouble: Whether note_success() has anything to say.
    """

    def __init__(self, timeout: float, on_retry: Callable[[], None] = lambda: None) -> None:
        self.timeout = timeout
        self._on_retry = on_retry
        self.is_in_trouble = False
        self._trouble_since = 0.0

    async def run(self, attempt: Callable[[], Awaitable[_T]], timeout: float | None = None) -> _T:
        """What an attempt returns.

        Args:
            attempt: What is done, once or more.
            timeout: Instead of the usual.

        Raises:
            Exception: What the attempt raised, where it does not pass or did not in time.
        """
        started_at = asyncio.get_running_loop().time()
        try:
            result = await attempt()
        except Exception as exc:  # noqa: BLE001 - check() raises what does not pass
            self.check(exc, timeout)
        else:
            self.note_success()
            return result
        return await self.again(attempt, started_at, timeout)

    def check(self, exc: Exception, timeout: float | None = None) -> None:
        """Notes that a first attempt failed; to be called while its error is handled.

        Args:
            exc: The error.
            timeout: Instead of the usual.

        Raises:
            Exception: The error, where it does not pass.
        """
        timeout = self.timeout if timeout is None else timeout
        if timeout <= 0 or not is_transient(exc):
            raise exc
        if not (self.is_in_trouble or (sqlstate_of(exc) or "").startswith(_CONFLICTS)):
            self.is_in_trouble = True
            self._trouble_since = asyncio.get_running_loop().time()
            logger.warning("PostgreSQL: %s; trying again for up to %g s", reason_of(exc), timeout)

    async def again(
        self,
        attempt: Callable[[], Awaitable[_T]],
        started_at: float,
        timeout: float | None = None,
    ) -> _T:
        """As run(), after a first attempt that was checked.

        Args:
            attempt: What is done, once or more.
            started_at: When the first one was begun, by the event loop's clock.
            timeout: Instead of the usual.
        """
        timeout = self.timeout if timeout is None else timeout
        left = started_at + timeout - asyncio.get_running_loop().time()
        repeat = AsyncRetrying(
            retry=retry_if_exception(_is_transient),
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
            stop=stop_after_delay(left),
            reraise=True,
        )

        async def counted() -> _T:
            self._on_retry()
            return await attempt()

        result: _T = await repeat(counted)
        self.note_success()
        return result

    def note_success(self) -> None:
        """Says that an attempt succeeded, after which trouble is over."""
        if self.is_in_trouble:
            seconds = asyncio.get_running_loop().time() - self._trouble_since
            self.is_in_trouble = False
            logger.info("PostgreSQL: recovered after %.1f s", seconds)


def _is_transient(exc: BaseException) -> bool:
    return isinstance(exc, Exception) and is_transient(exc)
