"""An event loop in a thread of its own, which other threads call through anyio's portal."""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from threading import Lock, RLock, Thread, current_thread
from typing import Any, Final, Generic, Protocol, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from taskiq_sa_pg.background import start_task
from taskiq_sa_pg.exceptions import ConfigurationError, NotStartedError

_T = TypeVar("_T")

_ENDED: Final = object()
_INSTEAD: Final = {
    "kiq": "await task.kiq(...)",
    "call": "await function(...)",
    "as_completed": "async for task, result in backend.as_completed(...)",
    "watch_progress": "async for progress in backend.watch_progress(...)",
}
_CLOSED: Final = "SyncResults was closed during the call"


class Lifespan(Protocol):
    """What works on the event loop."""

    async def startup(self) -> None:
        """Begins on the event loop."""

    async def shutdown(self) -> None:
        """Ends there."""


class Portals:
    """The portal of this process, opened when it is first needed.

    The child of a fork gets its own: the parent's thread does not run there, its locks may be held
    for ever, and its sockets are the parent's.
    """

    def __init__(self, lifespan: Lifespan) -> None:
        self._lifespan = lifespan
        self._by_process: dict[int, _Slot] = {}

    def get(self) -> "Portal":
        """The open portal; of many threads one opens it.

        Raises:
            Exception: Whatever startup() raises, for all threads that wait for it.
        """
        # setdefault() is atomic, and no lock survives a fork.
        slot = self._by_process.setdefault(os.getpid(), _Slot(self._lifespan))
        return slot.open()

    def close(self, timeout: float | None = None) -> None:
        """Ends the portal of this process, if there is one. The next get() opens another."""
        slot = self._by_process.get(os.getpid())
        if slot is not None:
            slot.close(timeout)

    def close_at_exit(self, timeout: float) -> None:
        """The same, within these seconds for each step, and without errors."""
        # A lost database must not keep the interpreter from ending.
        with suppress(Exception):
            self.close(timeout)


class _Slot:
    """The portal of one process."""

    def __init__(self, lifespan: Lifespan) -> None:
        self._lifespan = lifespan
        # Reentrant, because handlers of signals and the garbage collector may close it.
        self._lock = RLock()
        self._portal: Portal | None = None

    def open(self) -> "Portal":
        with self._lock:
            portal = self._portal
            if portal is None or portal.has_ended:
                if portal is not None:
                    portal.join()
                portal = self._portal = Portal(self._lifespan)
            portal.start()  # Ctrl-C may have interrupted an earlier start
        portal.wait_until_started()  # outside of the lock: Ctrl-C and close() need not wait
        return portal

    def close(self, timeout: float | None) -> None:
        portal = self._portal
        if portal is not None and portal.is_current_thread:
            portal.close_soon()  # without the lock: who has it may wait for this thread
            return
        with self._lock:
            if self._portal is not None:
                self._portal.close(timeout)


class Portal:
    """A running event loop, between startup() and shutdown() of something."""

    def __init__(self, lifespan: Lifespan) -> None:
        self._lifespan = lifespan
        self._gate = RLock()
        self._is_begun = Lock()  # locked, by the thread
        self._has_started = self._is_closing = False
        self._ending: set[asyncio.Task[None]] = set()
        self._thread: Thread | None = None
        self._opened: Future[BlockingPortal] = Future()
        self._started: Future[None] = Future()

    @property
    def is_current_thread(self) -> bool:
        """Whether this is called on its event loop, be it by the garbage collector."""
        return current_thread() is self._thread

    @property
    def has_ended(self) -> bool:
        """Whether it was closed, startup() has raised, or something has ended the event loop."""
        return self._is_closing

    def start(self) -> None:
        """Starts the event loop, unless that was done; Ctrl-C may interrupt it anywhere."""
        if not self._opened.done():
            # anyio's start_blocking_portal() has a thread, in 4.0, that keeps a program from
            # ending. If an interrupted call has already started one, this one returns at once.
            Thread(target=self._run, name="taskiq_sa_pg.sync", daemon=True).start()
        self._opened.result()

    def wait_until_started(self) -> None:
        """Returns after startup().

        Raises:
            NotStartedError: It was closed meanwhile.
        """
        try:
            self._started.result()
        except CancelledError:
            raise NotStartedError(_CLOSED) from None

    def call(self, function: Callable[[], Awaitable[_T]]) -> _T:
        """Runs an async function on the event loop; Ctrl-C cancels it.

        Raises:
            NotStartedError: It was closed meanwhile.
        """
        future = self._submit(function)
        try:
            return future.result()
        except CancelledError:
            raise NotStartedError(_CLOSED) from None
        except BaseException:
            future.cancel()
            raise

    def close_steps(self, steps: "Steps[Any]") -> None:
        """Closes a generator, and waits for that if this thread can."""
        if self.is_current_thread:
            self._begin(steps.close())
            return
        # What the portal has closed, or the parent of this process has, holds nothing here.
        with suppress(NotStartedError):
            self.call(steps.close)

    def close(self, timeout: float | None) -> None:
        """Ends what runs on the event loop, then the thread; each may take so many seconds.

        Raises:
            TimeoutError: The first took longer.
        """
        ending = None
        with self._gate:
            if not self._is_closing:
                self.start()
                with suppress(RuntimeError):  # it is about to end
                    ending = self._opened.result().start_task_soon(self._end)
                self._is_closing = True
        try:
            if ending is not None:
                ending.result(timeout)
        finally:
            self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Returns when the event loop has ended."""
        if self._thread is not None:
            self._thread.join(timeout)

    def close_soon(self) -> None:
        """Does so on its own thread, which cannot wait for that."""
        if not self._is_closing:
            self._is_closing = True
            self._begin(self._end())

    def _submit(self, function: Callable[[], Awaitable[_T]]) -> "Future[_T]":
        # One at a time, and none once it is closing: an event loop that ends at this moment would
        # leave the caller waiting.
        thread = self._thread
        # Not in the child of a fork, where the gate may be closed.
        if thread is not None and thread.is_alive():
            with self._gate, suppress(RuntimeError):  # it is about to end
                if not self._is_closing:
                    return self._opened.result().start_task_soon(function)
        raise NotStartedError(_CLOSED)

    def _begin(self, ending: Coroutine[Any, Any, None]) -> None:
        task = start_task(ending)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _run(self) -> None:
        if not self._is_begun.acquire(blocking=False):
            return
        self._thread = current_thread()
        error: BaseException | None = None
        try:
            anyio.run(self._main)
        except BaseException as exc:  # noqa: BLE001 - the thread that waits for it raises it
            # After startup() it is of no use to anybody: as the interpreter ends, the loop cannot
            # start the thread that would end its executor.
            error = exc
        self._is_closing = True  # also if a call has ended the event loop, with SystemExit
        for future in (self._opened, self._started):
            if error is not None and not future.done():
                future.set_exception(error)
        self._started.cancel()

    async def _main(self) -> None:
        async with BlockingPortal() as portal:
            self._opened.set_result(portal)
            try:
                await self._lifespan.startup()
            except asyncio.CancelledError:
                self._started.cancel()
                raise
            except BaseException as exc:  # noqa: BLE001 - as above
                self._is_closing = True
                self._started.set_exception(exc)
                return
            self._has_started = True
            self._started.set_result(None)
            await portal.sleep_until_stopped()

    async def _end(self) -> None:
        self._is_closing = True
        try:
            # A startup() that is cancelled cleans up after itself.
            if self._has_started:
                await self._lifespan.shutdown()
        finally:
            await self._opened.result().stop(cancel_remaining=True)


class Steps(Generic[_T]):
    """An async generator that other threads advance."""

    def __init__(self, generator: AsyncGenerator[_T, None]) -> None:
        self._generator = generator
        # A step that was cancelled has to end before the generator can be closed.
        self._turn = asyncio.Lock()

    async def next(self) -> tuple[_T, ...]:
        """The next value; an empty tuple at the end."""
        async with self._turn:
            value = await anext(self._generator, _ENDED)
            return () if value is _ENDED else (value,)  # type: ignore[return-value]  # see above

    async def close(self) -> None:
        """Ends the generator."""
        async with self._turn:
            await self._generator.aclose()


def refuse_event_loop(name: str) -> None:
    """Refuses a call in a thread whose event loop it would block.

    Raises:
        ConfigurationError: An event loop runs in this thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    instead = _INSTEAD.get(name, f"await backend.{name}(...)")
    raise ConfigurationError(
        f"SyncResults.{name}() would block the event loop that runs in this thread: in "
        f"asynchronous code, use `{instead}`, with a broker and result backend that were "
        "started on this event loop"
    )
