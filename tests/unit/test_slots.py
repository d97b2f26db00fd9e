"""Slots: never more than there are, first come first served, none lost."""

import asyncio
import random
from collections.abc import Iterable

import pytest

from taskiq_sa_pg.limits import Slots


def occupy(slots: Slots, names: Iterable[str], served: list[str]) -> list[asyncio.Task[None]]:
    """A task each that takes a place and notes its name."""

    async def take(name: str) -> None:
        await slots.wait()
        served.append(name)

    return [asyncio.create_task(take(name), name=name) for name in names]


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def free(slots: Slots) -> int:
    """How many places are free; they stay so."""
    taken = 0
    while slots.take():
        taken += 1
    for _ in range(taken):
        slots.give_back()
    return taken


async def test_a_place_is_taken_only_if_it_is_free() -> None:
    slots = Slots(2)
    assert [slots.take() for _ in range(3)] == [True, True, False]
    slots.give_back()
    assert [slots.take() for _ in range(2)] == [True, False]


async def test_whoever_has_waited_longest_is_served_first() -> None:
    slots, served = Slots(1), list[str]()
    assert slots.take()
    tasks = occupy(slots, "abc", served)
    for expected in ("a", "ab", "abc"):
        await turn()
        slots.give_back()
        assert not slots.take()  # nobody overtakes who waits
        await turn()
        assert "".join(served) == expected
    await asyncio.gather(*tasks)


async def test_who_is_cancelled_waits_no_more() -> None:
    slots, served = Slots(1), list[str]()
    assert slots.take()
    first, second, _ = occupy(slots, "abc", served)
    await turn()
    second.cancel()
    slots.give_back()
    # Given its place, and cancelled before it knows.
    first.cancel()
    await turn()
    assert served == ["c"]
    assert not slots.take()
    assert not slots._queue


async def test_who_is_cancelled_leaves_nothing_where_no_place_comes_free() -> None:
    slots = Slots(1)
    assert slots.take()
    tasks = occupy(slots, "abc", [])
    await turn()
    for task in tasks:
        task.cancel()
    await turn()
    assert not slots._queue


@pytest.mark.parametrize("seed", range(20))
async def test_no_place_is_lost_and_none_is_made(seed: int) -> None:
    chance = random.Random(seed)
    slots, inside, most = Slots(3), 0, 0

    async def visit() -> None:
        nonlocal inside, most
        async with slots:
            inside += 1
            most = max(most, inside)
            try:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                inside -= 1

    tasks = [asyncio.create_task(visit()) for _ in range(100)]
    while not all(task.done() for task in tasks):
        chance.choice(tasks).cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 3
    assert free(slots) == 3
    assert not slots._queue
