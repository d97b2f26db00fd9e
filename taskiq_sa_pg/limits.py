"""Bounds for statements: how long they may take, and how many run at once."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final

# The drivers ask the server to cancel a statement and wait for its answer: psycopg for 10 s, unless
# it is interrupted again.
SECONDS_TO_GIVE_UP: Final = 1.0


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Cancels what takes longer, and again where it does not end at once; yields how to lift it.

    Raises:
        TimeoutError: It took longer.
    """
    async with (
        asyncio.timeout(seconds + SECONDS_TO_GIVE_UP) as last_limit,
        asyncio.timeout(seconds) as limit,
    ):

        def lift() -> None:
            limit.reschedule(None)
            last_limit.reschedule(None)

        yield lift


class Watch:
    """A time limit for many short blocks, one after the other, with one timer for all of them.

    It cancels as time_limit() does. asyncio.timeout() and the drivers start a timer for each block
    and cancel it, which is a twentieth of a small statement; this one runs on, and when it goes off
    it looks what is due.

    Attributes:
        deadline: When the next block has to end, by the event loop's clock.

    Raises:
        TimeoutError: At the end of a block that took longer.
    """

    def __init__(self) -> None:
        self.deadline = 0.0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None  # that is in a block
        self._cancelling = 0  # how often others had cancelled it before
        self._cancelled = 0  # how often this has

    def __enter__(self) -> None:
        self._task = task = asyncio.current_task()
        assert task is not None
        self._cancelling = task.cancelling()
        if self._timer is None or self._timer.when() > self.deadline:
            self._set_timer()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        if not self._cancelled:
            return
        assert task is not None
        for _ in range(self._cancelled):
            task.uncancel()
        self._cancelled = 0
        # As asyncio.timeout(): who was cancelled by others as well stays cancelled.
        if task.cancelling() <= self._cancelling and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc

    def stop(self) -> None:
        """Ends the timer, unless a block is entered again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self.stop()
        self._timer = self._loop.call_at(self.deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() >= self.deadline:
            self._cancelled += 1
            self._task.cancel()
            self.deadline += SECONDS_TO_GIVE_UP
        self._set_timer()


class Slots:
    """A number of places, first come, first served: an asyncio.Semaphore.

    Where a place is free it is taken without a coroutine.
    """

    def __init__(self, number: int) -> None:
        self._free = number
        self._queue: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Takes a place, if one is free."""
        if self._free > 0:
            self._free -= 1
            return True
        return False

    async def wait(self) -> None:
        """Takes a place as soon as it is this caller's turn.

        Raises:
            CancelledError: The caller was cancelled, and has no place.
        """
        if self.take():
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.give_back()  # it was given a place, and is cancelled before it knows
            elif turn in self._queue:
                self._queue.remove(turn)
            raise

    def give_back(self) -> None:
        """Leaves a place, to whoever has waited longest."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    async def __aenter__(self) -> None:
        await self.wait()

    async def __aexit__(self, *_: object) -> None:
        self.give_back()
