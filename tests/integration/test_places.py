"""The places of a backend's connections: never more than there are, in turn, and none is lost."""

import asyncio
import random
from typing import Any

import pytest
import sqlalchemy as sa

from taskiq_sa_pg import StorageError
from taskiq_sa_pg.database import Database as Connected
from tests.integration.databases import (
    SESSION,
    Databases,
    session_of,
    session_of_transaction,
)


async def test_whoever_comes_first_is_served_first(databases: Databases) -> None:
    opened = await databases.open(max_connections=1)
    served: list[int] = []

    async def ask(number: int) -> None:
        await (session_of(opened) if number % 2 else session_of_transaction(opened))
        served.append(number)

    await asyncio.gather(*map(ask, range(20)))
    assert served == [*range(20)]


async def test_however_callers_are_cancelled_no_place_is_lost_and_none_is_made(
    databases: Databases,
) -> None:
    opened = await databases.open(max_connections=3, pool_size=10)
    pool: Any = opened.engine.pool
    chance = random.Random(1)
    for _ in range(5):
        calls = [asyncio.create_task(call_of(opened, number)) for number in range(30)]
        for call in chance.sample(calls, 20):
            call.cancel()
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
            assert pool.checkedout() <= 3
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, int | asyncio.CancelledError) for outcome in outcomes)
    # As many as before at once; and it takes all places to be closed.
    assert len(set(await asyncio.gather(*[asleep(opened) for _ in range(6)]))) == 3
    assert pool.checkedout() == opened.kept == 3
    async with asyncio.timeout(10):
        await opened.close()
    assert pool.checkedout() == 0


async def call_of(opened: Connected, number: int) -> Any:
    return await (session_of(opened) if number % 3 else session_of_transaction(opened))


async def asleep(opened: Connected) -> int:
    """The session of a statement that takes so long that the others need one of their own."""
    slow = SESSION.add_columns(sa.func.pg_sleep(0.1))
    [(session, _)] = await opened.fetch(slow, {}, "sleep")
    return int(session)


async def test_who_waits_for_a_place_too_long_gives_up(databases: Databases) -> None:
    opened = await databases.open(max_connections=1, command_timeout=0.1, retry_timeout=0)

    async def hold(connection: Any) -> None:
        with pytest.raises(StorageError, match="cannot ask"):
            await session_of(opened)

    await opened.transact(hold, "hold a connection", is_limited=False)
    await session_of(opened)
