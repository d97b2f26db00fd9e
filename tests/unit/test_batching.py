"""Group commit without a database: what is flushed together, and in which order."""

import asyncio
import random
from collections.abc import Awaitable, Generator, Mapping
from typing import Any

import pytest

from taskiq_sa_pg import NotStartedError
from taskiq_sa_pg.batching import MAX_BYTES, Batcher
from taskiq_sa_pg.telemetry import BatchMeter
from tests.unit.flushes import (
    AnyBatcher,
    Batch,
    Flushes,
    assert_at_rest,
    call,
    outcomes_of,
    same,
    submit,
    turns_of_the_loop,
)


@pytest.fixture
async def flushes() -> Flushes:
    return Flushes()


async def test_a_lone_call_is_flushed_at_once_by_its_caller(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    for number in range(3):
        [call] = submit(batcher, [number])
        await turns_of_the_loop(1)
        [*_, flush] = flushes.begun
        assert (flush.rows, flush.task) == ({number: number}, call)
        flush.end({number: "answer"})
        assert await call == "answer"
    await assert_at_rest(batcher)


async def test_after_a_batch_a_lone_caller_who_loops_flushes_its_own_calls_again() -> None:
    """One turn of the event loop later it would find the lane of its last call, each time."""
    tasks: list[asyncio.Task[Any] | None] = []

    async def flush(batch: Batch) -> dict[Any, Any]:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        return {}

    batcher: AnyBatcher = Batcher(flush, encode=same)
    await asyncio.gather(*[batcher.submit(key, key) for key in range(5)])
    tasks.clear()
    for key in range(10):
        await batcher.submit(key, key)
    # The first may have to find out that calls come one by one again.
    assert tasks[1:] == [asyncio.current_task()] * 9


async def test_calls_of_one_turn_are_one_flush(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    # The first finds nobody else there, and does not wait for others.
    calls = submit(batcher, range(20))
    await turns_of_the_loop()
    assert flushes.keys == [[0], [*range(1, 20)]]
    for flush in flushes.begun:
        flush.end(flush.rows)
    assert await asyncio.gather(*calls) == [*range(20)]


async def test_after_a_batch_the_first_call_of_a_turn_goes_with_the_others(
    flushes: Flushes,
) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    first = submit(batcher, range(10))
    await turns_of_the_loop()
    for flush in flushes.begun:
        flush.end()
    await asyncio.gather(*first)
    second = submit(batcher, range(10))
    await turns_of_the_loop()
    assert flushes.keys[2:] == [[*range(10)]]
    flushes.begun[2].end()
    await asyncio.gather(*second)
    # And of calls that come one by one again, the second is its caller's own.
    for number in (4, 5):
        [call] = submit(batcher, ["lone"])
        await turns_of_the_loop(3)
        flushes.begun[number - 1].end()
        await call
    assert flushes.begun[-1].task is call


@pytest.mark.parametrize("lanes", [1, 2, 3])
async def test_calls_that_find_all_lanes_busy_go_together(flushes: Flushes, lanes: int) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, lanes=lanes)
    calls = []
    for lane in range(lanes):
        calls += submit(batcher, [f"lane {lane}"])
        await turns_of_the_loop()
    assert len(flushes.begun) == lanes
    for number in range(5):
        calls += submit(batcher, [2 * number, 2 * number + 1])
        await turns_of_the_loop()
    assert len(flushes.begun) == lanes
    flushes.begun[-1].end()
    assert (await flushes.number(lanes + 1)).rows == {i: i for i in range(10)}
    for flush in [*flushes.begun[: lanes - 1], flushes.begun[lanes]]:
        flush.end()
    await asyncio.gather(*calls)
    await assert_at_rest(batcher)


async def test_a_large_batch_leaves_the_free_lanes_their_part(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, lanes=3)
    calls = submit(batcher, range(101))
    await turns_of_the_loop()
    assert flushes.keys == [[0], [*range(1, 51)], [*range(51, 101)]]
    for flush in flushes.begun:
        flush.end()
    await asyncio.gather(*calls)


async def test_a_lane_with_a_heap_shares_it_with_one_that_has_crumbs(flushes: Flushes) -> None:
    """Else the other would send many small batches while it is busy, and so for ever."""
    batcher: AnyBatcher = Batcher(flushes, encode=same, lanes=2)
    calls = submit(batcher, range(32))
    await turns_of_the_loop()
    calls += submit(batcher, ["crumb"])
    flushes.begun[0].end()
    await turns_of_the_loop()
    assert flushes.keys == [[0], [*range(1, 32)], ["crumb"]]
    calls += submit(batcher, range(100, 199))
    await turns_of_the_loop()
    flushes.begun[1].end()
    assert list((await flushes.number(4)).rows) == [*range(100, 150)]
    flushes.begun[2].end()
    assert list((await flushes.number(5)).rows) == [*range(150, 199)]
    for flush in flushes.begun[3:]:
        flush.end()
    await asyncio.gather(*calls)
    await assert_at_rest(batcher)


async def test_who_is_answered_and_calls_again_goes_with_those_who_wait(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, lanes=1)

    async def call_twice(number: int) -> None:
        await batcher.submit(number, "first")
        await batcher.submit(number, "second")

    calls = submit(batcher, ["blocker"])
    await turns_of_the_loop()
    calls += [asyncio.create_task(call_twice(number)) for number in range(10)]
    await turns_of_the_loop()
    flushes.begun[0].end()
    second = await flushes.number(2)
    calls += submit(batcher, ["late"])
    await turns_of_the_loop()
    second.end()
    third = await flushes.number(3)
    assert third.rows == {"late": "late"} | dict.fromkeys(range(10), "second")
    third.end()
    await asyncio.gather(*calls)
    await assert_at_rest(batcher)


async def test_a_batch_has_no_more_keys_than_its_limit(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, max_rows=7, lanes=1)
    calls = submit(batcher, range(20))
    for number, size in enumerate([1, 7, 7, 5], start=1):
        flush = await flushes.number(number)
        assert len(flush.rows) == size
        flush.end()
    await asyncio.gather(*calls)


async def test_a_batch_has_no_more_bytes_than_its_limit_but_for_one_row(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, size=same, lanes=1)
    sizes = [0, MAX_BYTES - 2, 1, 1, 1, MAX_BYTES + 1, MAX_BYTES + 2, 0, 3]
    calls = [call(batcher, key, size) for key, size in zip("abcdefghi", sizes, strict=True)]
    expected = ["a", "bcd", "e", "f", "g", "hi"]
    for number, keys in enumerate(expected, start=1):
        flush = await flushes.number(number)
        assert "".join(flush.rows) == keys
        flush.end()
    await asyncio.gather(*calls)
    assert len(flushes.begun) == len(expected)


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [([0, 0, 0], 2), ([0, 1, 0], 1), ([1, 0, 0], 0), ([0, 1, 1], 2), ([1, 1, 0], 1)],
    ids=str,
)
async def test_of_the_calls_for_a_key_the_last_of_the_highest_rank_is_flushed(
    flushes: Flushes, ranks: list[int], chosen: int
) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, rank=lambda item: item[0])
    [blocker] = submit(batcher, [(0, "blocker")])
    calls = [call(batcher, "key", item) for item in zip(ranks, range(3), strict=True)]
    flush = await flushes.number(2)
    assert flush.rows == {"key": (ranks[chosen], chosen)}
    await turns_of_the_loop()
    assert not any(call.done() for call in calls)
    flush.end({"key": "answer"})
    assert await asyncio.gather(*calls) == ["answer"] * 3
    flushes.begun[0].end()
    await blocker


async def test_an_answer_that_is_not_shared_goes_to_the_first_who_is_there(
    flushes: Flushes,
) -> None:
    unclaimed: list[Any] = []
    batcher: AnyBatcher = Batcher(
        flushes, encode=same, on_unclaimed=lambda *call: unclaimed.append(call)
    )
    calls = submit(batcher, ["key", "key", "key"])
    flush = await flushes.number(1)
    calls[0].cancel()
    flush.end({"key": "answer"})
    [cancelled, *answers] = await outcomes_of(calls)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert answers == ["answer", None]
    assert unclaimed == []


@pytest.mark.parametrize("is_answered_first", [False, True])
async def test_an_answer_that_nobody_takes_is_told_once(
    flushes: Flushes, is_answered_first: bool
) -> None:
    """Be the callers cancelled before it comes, or in the turn in which it has come."""
    unclaimed: list[Any] = []
    batcher: AnyBatcher = Batcher(
        flushes, encode=same, on_unclaimed=lambda *call: unclaimed.append(call)
    )
    calls = submit(batcher, ["key", "key"])
    flush = await flushes.number(1)
    if is_answered_first:
        flush.end({"key": "answer"})
        await turns_of_the_loop(1)  # the flush has it, and the callers do not yet
    for caller in calls:
        caller.cancel()
    if not is_answered_first:
        flush.end({"key": "answer"})
    outcomes = await outcomes_of(calls)
    await assert_at_rest(batcher)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
    assert unclaimed == [("key", "answer")]


async def test_what_interrupts_an_encoding_reaches_its_caller_alone(flushes: Flushes) -> None:
    class Interruption(BaseException):
        pass

    def encode(key: Any, item: Any) -> Any:
        if item == "bad":
            raise Interruption
        return item

    batcher: AnyBatcher = Batcher(flushes, encode=encode)
    blockers = submit(batcher, ["first", "second"])
    await flushes.number(1)
    calls = submit(batcher, ["good", "bad", "better"])
    await turns_of_the_loop()
    while flushes.begun:
        flushes.begun.pop().end()
        await turns_of_the_loop()
    outcomes = await outcomes_of([*blockers, *calls])
    assert [type(outcome) for outcome in outcomes[2:]] == [type(None), Interruption, type(None)]
    await assert_at_rest(batcher)


@pytest.mark.parametrize("seed", range(10))
async def test_however_calls_and_flushes_meet_the_last_call_for_a_key_is_flushed_last(
    seed: int,
) -> None:
    chance = random.Random(seed)
    lanes = chance.randint(1, 4)
    stored: dict[int, int] = {}
    in_flight: set[int] = set()
    ends: list[asyncio.Future[None]] = []

    async def flush(batch: Batch) -> Mapping[Any, Any]:
        assert in_flight.isdisjoint(batch), "two flushes hold a key"
        in_flight.update(batch)
        ends.append(asyncio.Future())
        assert len(ends) <= lanes
        await ends[-1]
        in_flight.difference_update(batch)
        stored.update((key, entry.row) for key, entry in batch.items())
        return stored

    batcher: AnyBatcher = Batcher(
        flush, encode=same, lanes=lanes, max_rows=chance.choice([1, 7, 500])
    )

    async def call(key: int, number: int) -> None:
        answer = await batcher.submit(key, number)
        assert answer is not None
        assert answer >= number

    def end_one() -> None:
        if ends:
            ends.pop(chance.randrange(len(ends))).set_result(None)

    calls, last = [], {}
    for number in range(500):
        key = chance.randrange(chance.choice([3, 300]))
        last[key] = number
        calls.append(asyncio.create_task(call(key, number)))
        await turns_of_the_loop(chance.choice([0, 0, 0, 1, 3]))
        if chance.random() < 0.2:
            end_one()
    while not all(call.done() for call in calls):
        end_one()
        await turns_of_the_loop(1)
    await asyncio.gather(*calls)
    assert stored == last
    await assert_at_rest(batcher)


async def test_closing_flushes_what_was_accepted_and_refuses_the_rest(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, max_rows=2, lanes=1)
    calls = submit(batcher, ["lone", 1, 2, 3, "lone"])
    await turns_of_the_loop()
    closing = asyncio.create_task(batcher.close())
    for number, keys in enumerate([["lone"], [1, 2], [3, "lone"]], start=1):
        flush = await flushes.number(number)
        await turns_of_the_loop()
        assert list(flush.rows) == keys
        with pytest.raises(NotStartedError):
            await batcher.submit(4, 4)
        assert not closing.done()
        flush.end()
    await asyncio.gather(closing, *calls)
    await batcher.close()
    await assert_at_rest(batcher)


async def test_closing_waits_for_a_lone_call_and_outlives_its_cancellation(
    flushes: Flushes,
) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    [call] = submit(batcher, ["lone"])
    await turns_of_the_loop()
    closing = asyncio.create_task(batcher.close())
    await turns_of_the_loop()
    assert not closing.done()
    call.cancel()
    await closing
    assert await outcomes_of([call]) != [None]


class Resumptions:
    """Awaits something, and counts how often it is resumed."""

    def __init__(self, awaited: Awaitable[None]) -> None:
        self.number = 0
        self._awaited = awaited

    def __await__(self) -> Generator[Any, None, None]:
        for waited_for in self._awaited.__await__():
            yield waited_for
            self.number += 1


async def test_closing_sleeps_until_a_flush_is_over(flushes: Flushes) -> None:
    """However many calls are there: pending, held back, cancelled, or in flight by themselves."""
    batcher: AnyBatcher = Batcher(flushes, encode=same, max_rows=2, lanes=1)
    calls = submit(batcher, ["lone", 1, 2, 3, "lone"])
    await turns_of_the_loop()
    calls[2].cancel()
    closing = Resumptions(batcher.close())
    closed = asyncio.ensure_future(closing)
    for number, keys in enumerate([["lone"], [1, 3], ["lone"]], start=1):
        flush = await flushes.number(number)
        await turns_of_the_loop(100)
        assert list(flush.rows) == keys
        assert closing.number == number - 1
        flush.end()
    await closed
    await outcomes_of(calls)


async def test_closing_where_all_who_waited_have_gone_ends(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, lanes=1)
    calls = submit(batcher, ["lone", 1, 2, "lone"])
    await turns_of_the_loop()
    for waiting in calls[1:]:
        waiting.cancel()
    flushes.begun[0].end()
    await batcher.close()
    assert flushes.keys == [["lone"]]
    await outcomes_of(calls)
    await assert_at_rest(batcher)


async def test_what_is_not_answered_yet_is_counted_until_closing(flushes: Flushes) -> None:
    meter = BatchMeter()
    batcher: AnyBatcher = Batcher(flushes, encode=same, lanes=1, meter=meter)
    calls = submit(batcher, ["lone", 1, 2, 2])
    await turns_of_the_loop()
    assert meter.pending == 3
    closing = asyncio.create_task(batcher.close())
    for number in (1, 2):
        (await flushes.number(number)).end()
    await asyncio.gather(closing, *calls)
    assert (meter.queues, meter.pending) == ([], 0)
    stats = meter.stats
    assert (stats.calls, stats.batches, stats.largest) == (4, 2, 2)


async def test_of_many_pending_calls_few_rows_are_encoded_before_their_turn() -> None:
    encoded, flushed, most = 0, 0, 0

    def encode(_: int, item: int) -> int:
        nonlocal encoded, most
        encoded += 1
        most = max(most, encoded - flushed)
        return item

    async def flush(batch: Batch) -> Mapping[Any, Any]:
        nonlocal flushed
        await asyncio.sleep(0)
        flushed += len(batch)
        return {}

    batcher: AnyBatcher = Batcher(flush, encode=encode, max_rows=500, lanes=2)
    await asyncio.gather(*submit(batcher, range(5_000)))
    assert encoded == flushed == 5_000
    assert most <= 2 * 500
    await assert_at_rest(batcher)
