"""time_limit(): what takes too long is cancelled, and nothing else is."""

import asyncio
from contextlib import suppress

import pytest

from taskiq_sa_pg.database import time_limit


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


def cancel_this_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def assert_not_cancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_what_takes_too_long_is_cancelled_and_nothing_later() -> None:
    async with asyncio.timeout(10):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with time_limit(0.01):
                    await for_ever()
            await assert_not_cancelled()
            async with time_limit(60):
                await asyncio.sleep(0)


async def test_what_does_not_end_at_once_is_cancelled_again() -> None:
    """A second later: psycopg asks the server to cancel, and waits for its answer."""
    cancelled = 0

    async def resist() -> None:
        nonlocal cancelled
        for _ in range(2):
            try:
                await for_ever()
            except asyncio.CancelledError:
                cancelled += 1
        raise asyncio.CancelledError

    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError):
            async with time_limit(0.01):
                await resist()
    assert cancelled == 2
    await assert_not_cancelled()


async def test_a_limit_that_is_lifted_holds_no_more() -> None:
    gone_off = asyncio.Event()
    async with time_limit(0.01) as lift:
        lift()
        asyncio.get_running_loop().call_later(0.03, gone_off.set)
        await gone_off.wait()
    await assert_not_cancelled()


async def test_who_is_cancelled_by_others_stays_cancelled() -> None:
    """Even where the limit is reached at the same time."""

    async def be_cancelled(has_reached_limit: bool) -> None:
        async with time_limit(0.01 if has_reached_limit else 60):
            if has_reached_limit:
                with suppress(asyncio.CancelledError):
                    await for_ever()
            cancel_this_task()
            await for_ever()

    for has_reached_limit in (False, True):
        task = asyncio.create_task(be_cancelled(has_reached_limit))
        async with asyncio.timeout(10):
            await asyncio.wait([task])
        assert task.cancelled()


async def test_another_error_is_raised_as_it_is() -> None:
    async def fail() -> None:
        try:
            await for_ever()
        except asyncio.CancelledError:
            raise ValueError("mine") from None

    with pytest.raises(ValueError, match="mine"):
        async with time_limit(0.01):
            await fail()
    await assert_not_cancelled()
