"""The thread with an event loop: started once, closed in every state, never in the way."""

import asyncio
import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from taskiq_sa_pg import NotStartedError
from taskiq_sa_pg.sync import portal as portal_module
from taskiq_sa_pg.sync.portal import Portal, Portals, Steps

# What does not come fails its test after this.
SOON = 20


class Lifespan:
    """Counts, and does what the test wants at the start and at the end."""

    def __init__(
        self, start: Callable[[], Any] | None = None, end: Callable[[], Any] | None = None
    ) -> None:
        self.start, self.end = start, end
        self.starts = self.ends = 0
        self.is_starting = threading.Event()

    async def startup(self) -> None:
        self.starts += 1
        self.is_starting.set()
        if self.start is not None:
            await self.start()

    async def shutdown(self) -> None:
        self.ends += 1
        if self.end is not None:
            await self.end()


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name == "taskiq_sa_pg.sync"}


def no_threads() -> bool:
    for thread in threading.enumerate():
        if thread.name == "taskiq_sa_pg.sync":
            thread.join(SOON)
    return not threads()


async def forever() -> None:
    await asyncio.Event().wait()


async def one() -> int:
    return 1


def test_all_threads_get_the_error_of_a_start_that_fails() -> None:
    may_fail = threading.Event()

    async def fail() -> None:
        await asyncio.to_thread(may_fail.wait, SOON)
        raise LookupError("no server")

    lifespan = Lifespan(fail)
    portals = Portals(lifespan)
    began = threading.Barrier(6)

    def get() -> Portal:
        began.wait(SOON)
        return portals.get()

    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(get) for _ in range(5)]
        began.wait(SOON)
        assert lifespan.is_starting.wait(SOON)
        may_fail.set()
        errors = [future.exception() for future in futures]
    assert [str(error) for error in errors] == ["no server"] * 5
    assert no_threads()
    lifespan.start = None
    assert portals.get().call(one) == 1
    portals.close()
    assert lifespan.ends == 1
    assert no_threads()


def test_a_call_that_close_interrupts_says_so() -> None:
    portals = Portals(Lifespan())
    portal, began = portals.get(), threading.Event()

    async def wait() -> None:
        began.set()
        await forever()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(portal.call, wait)
        assert began.wait(SOON)
        portals.close()
        with pytest.raises(NotStartedError, match="was closed during the call"):
            waiting.result(SOON)
    with pytest.raises(NotStartedError, match="was closed during the call"):
        portal.call(one)
    portals.close()  # again
    assert portals.get() is not portal
    portals.close()


def test_close_ends_a_start_that_does_not_end() -> None:
    lifespan = Lifespan(forever)
    portals = Portals(lifespan)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(portals.get)
        assert lifespan.is_starting.wait(SOON)
        portals.close()
        with pytest.raises(NotStartedError):
            starting.result(SOON)
    assert lifespan.ends == 0
    assert no_threads()


def test_at_exit_nobody_waits_for_an_end_that_does_not_come() -> None:
    may_end = threading.Event()

    async def stall() -> None:
        await asyncio.to_thread(may_end.wait, SOON)

    portals = Portals(Lifespan(end=stall))
    portals.get()
    portals.close_at_exit(0.01)
    assert threads()
    may_end.set()
    assert no_threads()


def test_an_error_at_the_end_is_raised_and_the_thread_has_ended() -> None:
    async def fail() -> None:
        raise LookupError("the end")

    portals = Portals(Lifespan(end=fail))
    portals.get()
    with pytest.raises(LookupError, match="the end"):
        portals.close()
    assert not threads()


def test_the_portal_s_own_thread_may_close_it() -> None:
    """As the garbage collector does there, with what it finds."""
    ended: list[int] = []

    async def start() -> None:
        assert len(ended) == lifespan.starts - 1

    async def end() -> None:
        for _ in range(1_000):
            await asyncio.sleep(0)
        ended.append(lifespan.ends)

    lifespan = Lifespan(start, end)
    portals = Portals(lifespan)

    async def close() -> None:
        portals.close()

    portals.get().call(close)
    portals.get()
    assert (lifespan.starts, lifespan.ends) == (2, 1)
    portals.get().call(close)
    assert no_threads()
    assert lifespan.ends == 2


def test_what_ends_on_the_event_loop_may_close_the_portal_again() -> None:
    portals = Portals(lifespan := Lifespan())

    async def close() -> None:
        portals.close()

    lifespan.end = close
    portals.get()
    portals.close()
    assert lifespan.ends == 1
    assert not threads()


def test_after_a_start_that_failed_there_is_nothing_to_close() -> None:
    async def fail() -> None:
        raise LookupError("no server")

    portals = Portals(lifespan := Lifespan(fail))
    with pytest.raises(LookupError):
        portals.get()
    portals.close()
    assert lifespan.ends == 0
    assert no_threads()


def interrupted_at(line: int, function: Callable[[], Any]) -> bool:
    """Whether KeyboardInterrupt came at this line, counted in those of the module that ran."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename == portal_module.__file__ and event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_at_any_line_leaves_nothing_that_is_in_the_way() -> None:
    line = 1

    def use() -> None:
        assert portals.get().call(one) == 1
        portals.close()

    while True:
        portals = Portals(lifespan := Lifespan())
        if not interrupted_at(line, use):
            break
        use()
        assert no_threads(), line
        assert lifespan.starts - lifespan.ends in {0, 1}  # one may have been cancelled
        line += 1
    assert line > 30


def test_a_call_that_ends_the_event_loop_is_the_last_on_it() -> None:
    portals = Portals(lifespan := Lifespan())

    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        portals.get().call(leave)
    assert no_threads()
    assert portals.get().call(one) == 1
    portals.close()
    assert lifespan.starts == 2


async def count(ended: threading.Event) -> Any:
    try:
        for number in range(100):
            yield number
            await asyncio.sleep(0)
    finally:
        ended.set()


def test_the_portal_s_own_thread_may_close_a_generator() -> None:
    portals, ended = Portals(Lifespan()), threading.Event()
    portal, steps = portals.get(), Steps(count(ended))
    assert portal.call(steps.next) == (0,)

    async def collect() -> None:
        portal.close_steps(steps)

    portal.call(collect)
    assert ended.wait(SOON)
    portals.close()
    portal.close_steps(steps)  # again, and too late
    gc.collect()


async def test_a_generator_is_closed_after_the_step_that_was_cancelled() -> None:
    began, is_over = asyncio.Event(), False

    async def values() -> Any:
        nonlocal is_over
        try:
            began.set()
            yield await forever()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            is_over = True

    steps = Steps(values())
    step = asyncio.create_task(steps.next())
    await began.wait()
    step.cancel()
    await steps.close()
    assert is_over
    assert step.cancelled()
