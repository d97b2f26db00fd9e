"""The gathering window: who waits in it, for how long, and what ends it."""

import asyncio
from typing import Any

import pytest

from taskiq_sa_pg.batching import Batcher
from taskiq_sa_pg.window import Window
from tests.unit.flushes import (
    AnyBatcher,
    Flushes,
    assert_at_rest,
    call,
    outcomes_of,
    same,
    submit,
    turns_of_the_loop,
)

MS = 0.001


class Clock:
    """Stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def flushes() -> Flushes:
    return Flushes()


async def asked_by_a_new_task(window: Window) -> bool:
    async def ask() -> bool:
        return window.is_worth_waiting()

    return await asyncio.create_task(ask())


async def stream(window: Window, clock: Clock, gap: float, number: int = 100) -> bool:
    """Calls that come after each other, of a task each: whether the last is worth waiting."""
    answers = []
    for _ in range(number):
        clock.now += gap
        answers.append(await asked_by_a_new_task(window))
    return answers[-1]


@pytest.mark.parametrize(("gap", "waits"), [(0.1 * MS, True), (3 * MS, True), (5 * MS, False)])
async def test_a_fast_stream_of_tasks_waits_and_a_slow_one_does_not(
    clock: Clock, gap: float, waits: bool
) -> None:
    assert await stream(Window(10 * MS, clock), clock, gap) is waits


async def test_a_few_calls_after_a_pause_do_not_wait(clock: Clock) -> None:
    window = Window(10 * MS, clock)
    assert await stream(window, clock, 0.5 * MS, number=10) is False
    assert await stream(window, clock, 0.5 * MS) is True
    clock.now += 60
    assert await stream(window, clock, 0.5 * MS, number=3) is False


async def test_who_calls_again_does_not_wait(clock: Clock) -> None:
    window = Window(10 * MS, clock)
    assert await stream(window, clock, 0.5 * MS) is True

    async def loop() -> list[bool]:
        return [window.is_worth_waiting() for _ in range(50)]

    first, *others = await asyncio.create_task(loop())
    assert first is True
    assert not any(others)


async def test_a_window_of_no_length_is_none(clock: Clock) -> None:
    assert await stream(Window(0, clock), clock, 0.1 * MS) is False


@pytest.mark.parametrize("seconds", [10 * MS, 5 * MS])
@pytest.mark.parametrize("places", [1, 4])
async def test_a_worker_with_few_places_is_not_held_up_for_long(
    clock: Clock, places: int, seconds: float
) -> None:
    """Its next task begins when a result is stored: nobody else comes into the window."""
    window = Window(seconds, clock)
    await stream(window, clock, 0.2 * MS)
    windows = 0
    for _ in range(50):
        clock.now += 0.2 * MS
        if await asked_by_a_new_task(window):
            windows += 1
            window.open()
            for _ in range(places - 1):
                await stream(window, clock, 0.2 * MS, number=1)
            clock.now += max(window.seconds_left, 0)
            window.close()
    assert windows == 4
    clock.now += 1
    assert await stream(window, clock, 0.2 * MS) is True  # it tries again


async def test_windows_in_which_calls_go_on_coming_are_opened_again(clock: Clock) -> None:
    window = Window(10 * MS, clock)
    await stream(window, clock, 0.5 * MS)
    for number in range(50):
        assert await asked_by_a_new_task(window), number
        window.open()
        await stream(window, clock, 0.5 * MS, number=20)
        window.close()
        clock.now += 0.5 * MS


async def test_it_ends_after_twice_the_usual_gap_or_its_length(clock: Clock) -> None:
    window = Window(10 * MS, clock)
    await stream(window, clock, 1 * MS)
    window.open()
    assert window.seconds_left == pytest.approx(2 * MS, rel=0.01)
    clock.now += 1.5 * MS
    assert window.seconds_left == pytest.approx(0.5 * MS, rel=0.05)
    await asked_by_a_new_task(window)
    assert window.seconds_left == pytest.approx(2 * MS, rel=0.1)
    await stream(window, clock, 1 * MS, number=8)  # 9.5 ms after it has opened
    assert window.seconds_left == pytest.approx(0.5 * MS, rel=0.1)
    clock.now += 1 * MS
    assert window.seconds_left < 0


async def busy(clock: Clock, flushes: Flushes, **arguments: Any) -> AnyBatcher:
    """A batcher to which calls come quickly; its window stays open until the clock is moved."""
    window = Window(10 * MS, clock)
    await stream(window, clock, 1 * MS)
    return Batcher(flushes, encode=same, window=window, **arguments)


async def test_calls_wait_for_each_other_until_none_comes(clock: Clock, flushes: Flushes) -> None:
    batcher = await busy(clock, flushes)
    calls = []
    for key in "abcde":
        clock.now += 1 * MS
        calls += submit(batcher, [key])
        await turns_of_the_loop()
    assert flushes.begun == []
    clock.now += 3 * MS
    (await flushes.number(1)).end()
    await outcomes_of(calls)
    assert flushes.keys == [[*"abcde"]]
    await assert_at_rest(batcher)


async def test_the_call_of_a_loop_ends_the_window(clock: Clock, flushes: Flushes) -> None:
    batcher = await busy(clock, flushes)
    gathered = submit(batcher, ["a", "b"])
    await turns_of_the_loop()

    async def loop() -> None:
        await batcher.submit("first", 1)
        await batcher.submit("second", 2)

    looping = asyncio.create_task(loop())
    await turns_of_the_loop()
    assert flushes.begun == []
    clock.now += 3 * MS
    (await flushes.number(1)).end()
    await turns_of_the_loop(3)
    later = submit(batcher, ["c"])
    # Its second call waits for nobody.
    flush = await flushes.number(2)
    assert "second" in flush.rows
    flush.end()
    if len(flushes.begun) == 2 and not later[0].done():
        clock.now += 3 * MS
        (await flushes.number(3)).end()
    await outcomes_of([*gathered, looping, *later])
    await assert_at_rest(batcher)


async def test_a_full_batch_does_not_wait(clock: Clock, flushes: Flushes) -> None:
    batcher = await busy(clock, flushes, max_rows=3)
    calls = submit(batcher, ["a", "b"])
    await turns_of_the_loop()
    assert flushes.begun == []
    calls += submit(batcher, ["c", "d"])
    flush = await flushes.number(1)
    assert list(flush.rows) == ["a", "b", "c"]
    flush.end()
    (await flushes.number(2)).end()
    await outcomes_of(calls)
    await assert_at_rest(batcher)


async def test_who_is_cancelled_in_the_window_touches_no_other(
    clock: Clock, flushes: Flushes
) -> None:
    batcher = await busy(clock, flushes)
    calls = submit(batcher, [*"abc"])
    await turns_of_the_loop()
    calls[0].cancel()
    await turns_of_the_loop()
    assert calls[0].cancelled()
    clock.now += 3 * MS
    (await flushes.number(1)).end({"b": 1, "c": 2})
    assert await outcomes_of(calls[1:]) == [1, 2]
    assert flushes.keys == [["b", "c"]]
    await assert_at_rest(batcher)


async def test_where_all_are_cancelled_in_the_window_nothing_is_flushed(
    clock: Clock, flushes: Flushes
) -> None:
    batcher = await busy(clock, flushes)
    calls = submit(batcher, [*"abc"])
    await turns_of_the_loop()
    for each in calls:
        each.cancel()
    clock.now += 3 * MS
    await outcomes_of(calls)
    await batcher.close()
    assert flushes.begun == []
    await assert_at_rest(batcher)


async def test_closing_waits_for_no_window(clock: Clock, flushes: Flushes) -> None:
    batcher = await busy(clock, flushes)
    calls = submit(batcher, [*"abc"])
    await turns_of_the_loop()
    closing = asyncio.create_task(batcher.close())
    (await flushes.number(1)).end()
    await closing
    assert await outcomes_of(calls) == [None] * 3
    await assert_at_rest(batcher)


async def test_without_a_window_nobody_waits(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    for key in range(100):
        waiting = call(batcher, key, key)
        await turns_of_the_loop(2)
        flushes.begun[-1].end()
        await waiting
    assert len(flushes.begun) == 100
