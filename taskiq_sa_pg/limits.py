"""Bounds for statements: how long they may take, and how many run at once."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self

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
    """A time limit for many short things, one after the other, with one timer for all of them.

    asyncio.timeout() and drivers start a timer for each and cancel it: a twentieth of a small
    statement. This one runs on, and looks what is due when it goes off.

    Raises:
        TimeoutError: At the end of a block that took longer; it was cancelled.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._deadline = 0.0
        self._is_over = False

    def within(self, seconds: float) -> Self:
        """For the next block, to be entered at once."""
        self._deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            self._set_timer()
        return self

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        if not self._is_over:
            return
        self._is_over = False
        assert task is not None
        # As asyncio.timeout(): who was cancelled by others as well stays cancelled.
        if task.uncancel() <= self._cancelling and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc

    def stop(self) -> None:
        """Ends the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self.stop()
        self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._deadline:
            self._set_timer()  # for the one that runs now
        else:
            self._is_over = True
            self._task.cancel()


class Slots:
    """A number of places, first come, first served: an asyncio.Semaphore.

    Where a place is free it is taken without a coroutine.
    """

    def __init__(self, number: int) -> None:
        self._free = number
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def has_free(self) -> bool:
        """Whether take() may be called."""
        return self._free > 0

    def take(self) -> None:
        """Takes a place that is free."""
        assert self._free > 0
        self._free -= 1

    async def wait(self) -> None:
        """Takes a place as soon as it is this caller's turn."""
        if self._free > 0:
            self._free -= 1
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
