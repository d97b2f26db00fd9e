"""Watch: what takes too long is cancelled, and nothing else is."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from taskiq_sa_pg.limits import Watch


@contextmanager
def within(watch: Watch, seconds: float) -> Iterator[None]:
    watch.deadline = asyncio.get_running_loop().time() + seconds
    with watch:
        yield


def assert_not_cancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_what_takes_too_long_is_cancelled() -> None:
    watch = Watch()
    async with asyncio.timeout(10):
        for _ in range(3):
            with pytest.raises(TimeoutError), within(watch, 0.01):
                await for_ever()
            assert_not_cancelled()
            with within(watch, 60):
                await asyncio.sleep(0)


async def test_a_short_limit_holds_after_a_long_one() -> None:
    watch = Watch()
    with within(watch, 3600):
        pass
    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError), within(watch, 0.01):
            await for_ever()


async def test_an_earlier_limit_does_not_hold_for_a_later_block() -> None:
    watch = Watch()
    with within(watch, 0.01):
        pass
    gone_off = asyncio.Event()
    with within(watch, 60):
        # Later than the timer that the first block has started, and in the same order.
        asyncio.get_running_loop().call_later(0.05, gone_off.set)
        await gone_off.wait()
    assert_not_cancelled()


async def test_many_blocks_share_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    timers = []
    call_at = loop.call_at

    def counting_call_at(*arguments: object, **options: object) -> asyncio.TimerHandle:
        timers.append(call_at(*arguments, **options))  # type: ignore[arg-type]
        return timers[-1]

    monkeypatch.setattr(loop, "call_at", counting_call_at)
    watch = Watch()
    for _ in range(1000):
        with within(watch, 60):
            pass
    assert len(timers) == 1
    watch.stop()
    assert timers[0].cancelled()


async def test_who_is_cancelled_by_others_stays_cancelled() -> None:
    """Even where the limit is reached at the same time."""

    begun = asyncio.Event()

    async def work() -> None:
        with within(Watch(), 60):
            begun.set()
            await for_ever()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()

    async def work_on() -> None:
        watch = Watch()
        with within(watch, 0.01):
            with suppress(asyncio.CancelledError):
                await for_ever()
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await for_ever()

    task = asyncio.create_task(work_on())
    async with asyncio.timeout(10):
        await asyncio.wait([task])
    assert task.cancelled()


async def test_what_does_not_end_at_once_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taskiq_sa_pg.limits.SECONDS_TO_GIVE_UP", 0.01)
    cancelled = 0

    async def resist() -> None:
        nonlocal cancelled
        for _ in range(2):
            try:
                await for_ever()
            except asyncio.CancelledError:
                cancelled += 1
        await for_ever()

    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError), within(Watch(), 0.01):
            await resist()
    assert cancelled == 2
    assert_not_cancelled()


async def test_another_error_is_raised_as_it_is() -> None:
    async def fail() -> None:
        try:
            await for_ever()
        except asyncio.CancelledError:
            raise ValueError("mine") from None

    watch = Watch()
    with pytest.raises(ValueError, match="mine"), within(watch, 0.01):
        await fail()
    assert_not_cancelled()
    with within(watch, 60):
        await asyncio.sleep(0)
