"""Which connections the statements run on: how many, and for how long."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from taskiq_sa_pg import (
    ConfigurationError,
    ResultIsMissingError,
    StorageError,
)
from taskiq_sa_pg.connections import _MAX_SECONDS_KEPT
from taskiq_sa_pg.engines import make_engine
from taskiq_sa_pg.store import Store
from tests.conftest import (
    BackendFactory,
    Database,
    assert_comes_to_rest,
    engine_of,
    eventually,
)
from tests.integration.stores import (
    FAILING,
    PROGRESS,
    Backend,
    Checkouts,
    Stores,
    assert_disconnected,
    each_owner,
    session_of,
    session_of_transaction,
)
from tests.tasks import result_of


async def test_an_owned_engines_connection_serves_one_statement_after_the_other(
    stores: Stores, checkouts: Checkouts
) -> None:
    store = await stores.open(pool_events=checkouts.pool_events)
    assert len({await session_of(store) for _ in range(10)}) == 1
    assert (checkouts.total, checkouts.current) == (1, 1)


async def test_a_connection_goes_back_to_the_pool_in_the_end(
    stores: Stores, checkouts: Checkouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 5 s at most, even if it is not used any more."""
    assert _MAX_SECONDS_KEPT == 5
    monkeypatch.setattr("taskiq_sa_pg.connections._MAX_SECONDS_KEPT", 0.2)
    store = await stores.open(pool_events=checkouts.pool_events)
    await asyncio.gather(*[session_of(store) for _ in range(10)])

    async def are_all_back() -> bool:
        return checkouts.current == 0

    await eventually(are_all_back)
    await session_of(store)
    await eventually(are_all_back)


async def test_a_connection_goes_back_to_the_pool_however_busy_it_is(
    stores: Stores, checkouts: Checkouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that pool_recycle and pool_pre_ping have their turn."""
    monkeypatch.setattr("taskiq_sa_pg.connections._MAX_SECONDS_KEPT", 0.2)
    store = await stores.open(pool_events=checkouts.pool_events, pool_recycle=0)
    sessions = set()

    async def are_several() -> bool:
        sessions.add(await session_of(store))  # far more often than it would go back unused
        return len(sessions) >= 3

    await eventually(are_several)
    assert checkouts.most == 1


async def test_closing_gives_every_connection_back(
    stores: Stores, database: Database, checkouts: Checkouts
) -> None:
    store = await stores.open(pool_events=checkouts.pool_events)
    await asyncio.gather(*[session_of(store) for _ in range(10)])
    assert checkouts.current == len(await database.sessions("ours")) == 4
    await store.close()
    assert checkouts.current == 0
    await assert_disconnected(database)


async def test_a_borrowed_engines_connection_is_back_when_the_call_returns(
    stores: Stores, checkouts: Checkouts
) -> None:
    store = await stores.open("borrowed", pool_events=checkouts.pool_events)
    for _ in range(3):
        await session_of(store)
        assert checkouts.current == 0
        with pytest.raises(StorageError, match="division by zero"):
            await store.fetch(FAILING, {}, "divide")
        assert checkouts.current == 0
        await session_of_transaction(store)
        assert checkouts.current == 0
        with pytest.raises(StorageError, match="division by zero"):
            await store.transact(lambda connection: connection.execute(FAILING), "divide")
        assert checkouts.current == 0
    assert checkouts.total == 12


@each_owner
async def test_no_more_connections_are_in_use_than_are_allowed(
    owner: str, stores: Stores, checkouts: Checkouts
) -> None:
    store = await stores.open(owner, max_connections=2, pool_events=checkouts.pool_events)
    for _ in range(3):
        await asyncio.gather(
            *[run(store) for _ in range(10) for run in (session_of, session_of_transaction)]
        )
    assert checkouts.most == 2


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
    for _ in range(3):
        await mix(backend)
        with pytest.raises(ResultIsMissingError):
            await backend.get_result("00")
    engine = engine_of(backend)
    await assert_comes_to_rest(backend)
    await backend.shutdown()
    await engine.dispose()


async def test_no_connection_at_all_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_connections must be 1 or more, not 0"):
        Store("postgresql://", max_connections=0)
