"""Which connections the statements run on: how many, and for how long."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from taskiq_sa_pg import ConfigurationError, ResultIsMissingError, StorageError
from taskiq_sa_pg.database import Database as Connected
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings
from tests.conftest import (
    BackendFactory,
    Database,
    assert_comes_to_rest,
    engine_of,
    eventually,
)
from tests.integration.databases import (
    FAILING,
    PROGRESS,
    Backend,
    Checkouts,
    Databases,
    assert_disconnected,
    each_owner,
    session_of,
    session_of_transaction,
)
from tests.tasks import result_of


async def test_an_owned_engines_connection_serves_one_statement_after_the_other(
    databases: Databases, checkouts: Checkouts
) -> None:
    opened = await databases.open(pool_events=checkouts.pool_events)
    assert len({await session_of(opened) for _ in range(10)}) == 1
    assert (checkouts.total, checkouts.current) == (1, 1)


BRIEFLY = Timings(keep_connection=0.1)


async def test_a_connection_goes_back_to_the_pool_in_the_end(
    databases: Databases, checkouts: Checkouts
) -> None:
    """After 5 s at most, even if it is not used any more."""
    assert DEFAULT_TIMINGS.keep_connection == 5
    opened = await databases.open(pool_events=checkouts.pool_events, timings=BRIEFLY)
    await asyncio.gather(*[session_of(opened) for _ in range(10)])

    async def are_all_back() -> bool:
        return checkouts.current == 0

    await eventually(are_all_back)
    await session_of(opened)
    await eventually(are_all_back)


async def test_a_connection_goes_back_to_the_pool_however_busy_it_is(
    databases: Databases, checkouts: Checkouts
) -> None:
    """So that pool_recycle and pool_pre_ping have their turn."""
    opened = await databases.open(
        pool_events=checkouts.pool_events, pool_recycle=0, timings=BRIEFLY
    )
    sessions = set()
    async with asyncio.timeout(10):
        while len(sessions) < 3:
            sessions.add(await session_of(opened))
    assert checkouts.most == 1


async def test_closing_gives_every_connection_back(
    databases: Databases, database: Database, checkouts: Checkouts
) -> None:
    opened = await databases.open(pool_events=checkouts.pool_events)
    await asyncio.gather(*[session_of(opened) for _ in range(10)])
    assert checkouts.current == len(await database.sessions("ours")) == 4
    await opened.close()
    assert checkouts.current == 0
    await assert_disconnected(database)


async def test_a_borrowed_engines_connection_is_back_when_the_call_returns(
    databases: Databases, checkouts: Checkouts
) -> None:
    opened = await databases.open("borrowed", pool_events=checkouts.pool_events)
    for _ in range(2):
        await session_of(opened)
        assert checkouts.current == 0
        with pytest.raises(StorageError, match="division by zero"):
            await opened.fetch(FAILING, {}, "divide")
        assert checkouts.current == 0
        await session_of_transaction(opened)
        assert checkouts.current == 0
        with pytest.raises(StorageError, match="division by zero"):
            await opened.transact(lambda connection: connection.execute(FAILING), "divide")
        assert checkouts.current == 0
    assert checkouts.total == 8


@each_owner
async def test_no_more_connections_are_in_use_than_are_allowed(
    owner: str, databases: Databases, checkouts: Checkouts
) -> None:
    opened = await databases.open(owner, max_connections=2, pool_events=checkouts.pool_events)
    for _ in range(2):  # with connections that are new, and with those that were kept
        await asyncio.gather(
            *[run(opened) for _ in range(10) for run in (session_of, session_of_transaction)]
        )
    assert checkouts.most == 2


@each_owner
async def test_whoever_waits_for_a_connection_has_it_in_his_turn(
    owner: str, databases: Databases
) -> None:
    """Also where some of those who wait are cancelled."""
    opened = await databases.open(owner, max_connections=1)
    served = []

    async def call(number: int) -> None:
        await (session_of if number % 2 else session_of_transaction)(opened)
        served.append(number)

    calling = [asyncio.create_task(call(number)) for number in range(12)]
    await asyncio.sleep(0)  # until all wait
    for number in (0, 3, 4, 11):  # the first has the connection
        calling[number].cancel()
    outcomes = await asyncio.gather(*calling, return_exceptions=True)
    assert served == [number for number, outcome in enumerate(outcomes) if outcome is None]
    assert served == [1, 2, 5, 6, 7, 8, 9, 10]


@each_owner
async def test_a_backend_uses_no_more_connections_than_are_allowed(
    owner: str, dsn: str, start_backend: BackendFactory, checkouts: Checkouts
) -> None:
    pool = {"pool_size": 5, "pool_events": checkouts.pool_events}
    source: dict[str, Any] = {"dsn": dsn, **pool}
    if owner == "borrowed":
        source = {"engine": make_engine(dsn, **pool)}
    backend: Backend = await start_backend(**source, keep_results=False, max_connections=1)
    engine = engine_of(backend)
    await mix(backend)
    await assert_comes_to_rest(backend)
    assert checkouts.most == 1
    await backend.shutdown()
    assert checkouts.current == 0
    await engine.dispose()


async def mix(backend: Backend) -> None:
    """Fifty calls of every kind at once; of the stored results each is read."""
    task_ids = [f"{i:02}" for i in range(10)]
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in task_ids])
    calls: list[Awaitable[Any]] = [
        call
        for i in task_ids
        for call in (
            backend.set_progress(f"other {i}", PROGRESS),
            backend.is_result_ready(i),
            backend.get_progress(i),
            backend.set_result(f"other {i}", result_of(i)),
        )
    ]
    results = await asyncio.gather(*[backend.get_result(i) for i in task_ids], *calls)
    assert [result.return_value for result in results[:10]] == task_ids


@each_owner
async def test_a_pool_of_one_connection_is_enough(
    owner: str, dsn: str, start_backend: BackendFactory
) -> None:
    """Fifty calls at once neither wait for each other's connections nor for the pool's timeout."""
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.5}
    source: dict[str, Any] = {"dsn": dsn, **pool}
    if owner == "borrowed":
        source = {"engine": make_engine(dsn, **pool)}
    backend: Backend = await start_backend(**source, keep_results=False)
    for _ in range(2):
        await mix(backend)
        with pytest.raises(ResultIsMissingError):
            await backend.get_result("00")
    engine = engine_of(backend)
    await assert_comes_to_rest(backend)
    await backend.shutdown()
    await engine.dispose()


async def test_no_connection_at_all_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"max_connections must be .* 1 or more, not 0"):
        Connected("postgresql://", max_connections=0)
