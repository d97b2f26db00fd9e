"""Group commit without a database: refused rows, and callers or lanes that are cancelled."""

import asyncio
import random
from typing import Any

import pytest

from taskiq_sa_pg import NotStartedError, ResultDecodeError, StorageError
from taskiq_sa_pg.batching import Batcher
from tests.unit.flushes import (
    AnyBatcher,
    Flushes,
    Table,
    assert_at_rest,
    call,
    outcomes_of,
    refusal,
    same,
    submit,
    turns_of_the_loop,
)


@pytest.fixture
async def flushes() -> Flushes:
    return Flushes()


@pytest.mark.parametrize(
    "sqlstate", ["21000", "22P05", "23514", "27000", "44000", "54000", "P0001"]
)
async def test_of_a_refused_batch_only_the_guilty_fail(sqlstate: str) -> None:
    guilty = {3, 100, 101, 499}
    table = Table(guilty, refusal(sqlstate))
    batcher: AnyBatcher = Batcher(table, encode=same)
    outcomes = await outcomes_of(submit(batcher, range(500)))
    assert {i for i, o in enumerate(outcomes) if isinstance(o, StorageError)} == guilty
    assert table.stored == {i: i for i in range(500) if i not in guilty}
    assert [o for o in outcomes if not isinstance(o, StorageError)] == sorted(table.stored)
    assert table.statements < 100
    await assert_at_rest(batcher)


async def test_what_cannot_be_decoded_blames_its_row() -> None:
    batcher: AnyBatcher = Batcher(Table({7}, ResultDecodeError("7", "t", "why")), encode=same)
    outcomes = await outcomes_of(submit(batcher, range(20)))
    assert isinstance(outcomes.pop(7), ResultDecodeError)
    assert outcomes == [i for i in range(20) if i != 7]


@pytest.mark.parametrize(
    "error",
    [refusal("42P01"), refusal("57P01"), refusal(None), NotStartedError("no"), OSError("gone")],
    ids=repr,
)
async def test_an_error_that_blames_no_row_reaches_all_callers_of_its_batch(
    error: Exception,
) -> None:
    table = Table({7}, error)
    batcher: AnyBatcher = Batcher(table, encode=same, lanes=1)
    keys = [*range(1, 30), 7, 7]
    [stored, *outcomes] = await outcomes_of(submit(batcher, [0, *keys]))
    assert stored == 0
    for key, outcome in zip(keys, outcomes, strict=True):
        assert_is_told(outcome, error, key)
    assert (table.stored, table.statements) == ({0: 0}, 2)
    assert await batcher.submit("later", 1) == 1


def assert_is_told(outcome: object, error: Exception, key: Any) -> None:
    """What PostgreSQL said names the task; any other error stays what it is."""
    if not isinstance(error, StorageError):
        assert outcome is error
        return
    assert isinstance(outcome, StorageError)
    assert outcome.args == (f"task '{key}': {error}", error.sqlstate)
    assert outcome.__cause__ is error.__cause__


@pytest.mark.parametrize("error", [refusal("57P01"), refusal("23514"), OSError("gone")], ids=repr)
async def test_a_lone_caller_is_told_the_same(error: Exception) -> None:
    error.__cause__ = ValueError("the driver's")
    batcher: AnyBatcher = Batcher(Table({7}, error), encode=same)
    [outcome] = await outcomes_of(submit(batcher, [7]))
    assert_is_told(outcome, error, 7)
    await assert_at_rest(batcher)
    assert await batcher.submit(7, 1) == 1


async def test_where_the_chosen_call_is_refused_the_one_before_has_its_turn() -> None:
    table = Table({"bad", "worse"})
    batcher: AnyBatcher = Batcher(table, encode=same)
    items = ["first", "good", "bad", "worse"]
    calls = [call(batcher, *pair) for pair in [("blocker", 0), *[("key", item) for item in items]]]
    [_, *outcomes] = await outcomes_of(calls)
    assert outcomes[:2] == ["good", "good"]
    assert [type(outcome) for outcome in outcomes[2:]] == [StorageError, StorageError]
    assert table.stored == {"blocker": 0, "key": "good"}


def encode_or_refuse(*key_and_item: Any) -> Any:
    item = key_and_item[-1]
    if item == "bad":
        raise ValueError(item)
    return item


async def test_a_lone_item_that_makes_no_row_fails_its_caller() -> None:
    table = Table()
    batcher: AnyBatcher = Batcher(table, encode=encode_or_refuse)
    with pytest.raises(ValueError, match="bad"):
        await batcher.submit("lone", "bad")
    assert table.statements == 0
    await assert_at_rest(batcher)


@pytest.mark.parametrize("argument", ["encode", "size"])
async def test_an_item_that_makes_no_row_fails_its_own_caller(argument: str) -> None:
    table = Table()
    functions: dict[str, Any] = {"encode": same, argument: encode_or_refuse}
    batcher: AnyBatcher = Batcher(table, **functions)
    pairs = [("a", 1), ("key", 2), ("key", "bad"), ("other", "bad"), ("b", 3)]
    async with asyncio.timeout(10):
        outcomes = await outcomes_of([call(batcher, *pair) for pair in pairs])
    assert [type(outcome) for outcome in outcomes] == [int, int, ValueError, ValueError, int]
    assert table.stored == {"a": 1, "key": 2, "b": 3}
    await assert_at_rest(batcher)


async def test_a_call_that_never_starts_leaves_nothing(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    [never_started] = submit(batcher, ["key"])
    never_started.cancel()
    batcher.submit("key", "never awaited").close()
    await turns_of_the_loop()
    assert never_started.cancelled()
    assert flushes.begun == []
    await assert_at_rest(batcher)
    # Nor among others, of which it is the first or the last.
    calls = submit(batcher, ["key", "a", "b", "key"])
    calls[0].cancel()
    calls[3].cancel()
    await turns_of_the_loop()
    assert flushes.keys == [["a"], ["b"]]
    for flush in flushes.begun:
        flush.end()
    assert await asyncio.gather(*calls[1:3]) == [None, None]
    await assert_at_rest(batcher)


async def test_a_call_that_is_cancelled_before_its_flush_is_left_out(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same, lanes=1)
    calls = [
        call(batcher, key, item)
        for key, item in [("blocker", 0), ("a", 1), ("a", 2), ("b", 3), ("c", 4), ("blocker", 5)]
    ]
    await flushes.number(1)
    await turns_of_the_loop()
    for i in (2, 3, 5):
        calls[i].cancel()
    flushes.begun[0].end()
    flush = await flushes.number(2)
    assert flush.rows == {"a": 1, "c": 4}
    flush.end({"a": "A", "c": "C"})
    cancelled = asyncio.CancelledError
    outcomes = await outcomes_of(calls)
    assert [type(o) for o in outcomes] == [type(None), str, cancelled, cancelled, str, cancelled]
    await assert_at_rest(batcher)


async def test_a_call_that_is_cancelled_during_its_flush_touches_no_other(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    calls = submit(batcher, range(5))
    flush = await flushes.number(2)
    calls[0].cancel()  # the lone one: its flush is its own
    calls[3].cancel()
    await turns_of_the_loop()
    assert flushes.begun[0].outcome.cancelled()
    assert not flush.outcome.done()
    flush.end(flush.rows)
    outcomes = await outcomes_of(calls)
    assert [o for o in outcomes if not isinstance(o, asyncio.CancelledError)] == [1, 2, 4]
    [call] = submit(batcher, ["next"])
    (await flushes.number(3)).end({"next": "answer"})
    assert await call == "answer"
    await assert_at_rest(batcher)


async def test_a_call_for_the_key_of_a_cancelled_lone_call_is_flushed(flushes: Flushes) -> None:
    batcher: AnyBatcher = Batcher(flushes, encode=same)
    first, second = submit(batcher, ["key", "key"])
    await turns_of_the_loop()
    assert len(flushes.begun) == 1
    first.cancel()
    (await flushes.number(2)).end({"key": "answer"})
    assert await second == "answer"


@pytest.mark.parametrize("seed", range(5))
async def test_of_many_calls_with_every_second_cancelled_the_others_are_stored(seed: int) -> None:
    chance = random.Random(seed)
    table = Table(refused=range(0, 1000, 97))
    batcher: AnyBatcher = Batcher(table, encode=same, max_rows=50)
    calls = []
    for number in range(1000):
        calls.append(call(batcher, number % 400, number))
        await turns_of_the_loop(chance.choice([0] * 9 + [1]))
        if number % 2:
            chance.choice(calls[-50:]).cancel()
    for number, outcome in enumerate(await outcomes_of(calls)):
        if isinstance(outcome, StorageError):
            assert number % 97 == 0
        elif not isinstance(outcome, asyncio.CancelledError):
            assert number <= outcome <= table.stored[number % 400]
    assert sum(call.cancelled() for call in calls) > 100
    await assert_at_rest(batcher)


@pytest.mark.parametrize("turns", range(6))
async def test_a_lane_that_is_cancelled_leaves_no_caller_waiting(turns: int) -> None:
    """Whenever it is: those of its batch are cancelled with it, the others are flushed."""
    table = Table()
    batcher: AnyBatcher = Batcher(table, encode=same, max_rows=3, lanes=1)
    calls = submit(batcher, range(10))
    await turns_of_the_loop(turns)
    for lane in asyncio.all_tasks() - {asyncio.current_task(), *calls}:
        lane.cancel()
    async with asyncio.timeout(10):
        outcomes = await outcomes_of(calls)
    cancelled = [o for o in outcomes if isinstance(o, asyncio.CancelledError)]
    assert len(cancelled) <= 3
    assert [o for o in outcomes if o not in cancelled] == sorted(table.stored)
    await assert_at_rest(batcher)


async def test_when_all_tasks_are_cancelled_nobody_waits_and_the_next_call_works() -> None:
    for turns in range(6):
        batcher: AnyBatcher = Batcher(Table(), encode=same, max_rows=3)
        calls = submit(batcher, range(20))
        await turns_of_the_loop(turns)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await outcomes_of(calls)
        await assert_at_rest(batcher)
        assert await batcher.submit("next", 1) == 1
