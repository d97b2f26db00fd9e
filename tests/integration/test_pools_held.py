"""Engines of an application whose own sessions hold all the connections that the pool may open."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg import SQLAlchemyResultBackend, StorageError
from tests.conftest import BackendFactory, Database, eventually
from tests.integration.engines import make
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

ALL_ARE_HELD = (
    r"all 2 connections of your engine's pool are checked out.*close the session first, enlarge "
    r"the pool, or pass dsn= instead of engine= to the backend or broker"
)

# Far longer than anything here may take.
LONG = 60.0


@pytest.fixture(params=["asyncpg", "psycopg"])
async def engine(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[AsyncEngine]:
    """It gives up waiting for a connection soon."""
    engine = make(database.dsn_of(request.param), pool_size=2, max_overflow=0, pool_timeout=0.2)
    yield engine
    await engine.dispose()


@pytest.fixture
async def backend(engine: AsyncEngine, start_backend: BackendFactory) -> Backend:
    backend: Backend = await start_backend(engine=engine, retry_timeout=LONG, notify=False)
    await backend.set_result("there", result_of(1))
    return backend


@asynccontextmanager
async def held(engine: AsyncEngine) -> AsyncIterator[list[int]]:
    """Sessions that the application has open; gives the server's processes behind them."""
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(AsyncSession(engine)) for _ in range(2)]
        yield [(await s.execute(text("SELECT pg_backend_pid()"))).scalar_one() for s in sessions]


async def test_the_error_says_who_holds_the_connections_and_what_to_do(
    backend: Backend, engine: AsyncEngine
) -> None:
    """As soon as the engine's own pool_timeout has passed, and not after other limits."""
    calls = {
        "set_result": lambda: backend.set_result("a", result_of(1)),
        "set_progress": lambda: backend.set_progress("a", progress_of(1)),
        "get_result": lambda: backend.get_result("there"),
        "get_results": lambda: backend.get_results(["there"]),
        "iter_results": lambda: anext(backend.iter_results()),
        "prune": backend.prune,
    }
    async with held(engine), asyncio.timeout(LONG / 2):
        for name, call in calls.items():
            with pytest.raises(StorageError, match=ALL_ARE_HELD):
                await call()
            assert backend.stats().retries == 0, name
    assert (await backend.get_result("there")).return_value == 1


async def test_tasks_that_hold_a_session_each_do_not_stand_still(
    backend: Backend, engine: AsyncEngine
) -> None:
    async def work(number: int) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 1"))
            await backend.set_progress(f"task {number}", progress_of(number))

    async with asyncio.timeout(LONG / 2):
        outcomes = await asyncio.gather(*map(work, range(2)), return_exceptions=True)
    assert outcomes
    for outcome in outcomes:
        if outcome is not None:
            assert isinstance(outcome, StorageError)
            assert "connections of your engine's pool" in str(outcome)


async def test_a_caller_s_own_limit_is_kept(backend: Backend, engine: AsyncEngine) -> None:
    async with held(engine), asyncio.timeout(LONG / 2):
        with pytest.raises(TaskiqResultTimeoutError):
            await backend.wait_result("there", timeout=0.05)
    assert (await backend.wait_result("there", timeout=LONG)).return_value == 1


async def test_the_connections_of_the_application_are_left_alone(
    backend: Backend, engine: AsyncEngine
) -> None:
    """A pool that is in use is no outage: nothing is replaced."""
    async with held(engine) as before:
        with pytest.raises(StorageError, match=ALL_ARE_HELD):
            await backend.set_result("a", result_of(1))
    await asyncio.gather(*[backend.set_result(f"task {i}", result_of(i)) for i in range(5)])
    async with held(engine) as after:
        assert sorted(after) == sorted(before)


async def test_whoever_gets_a_connection_in_time_stores_his_result(
    backend: Backend, engine: AsyncEngine
) -> None:
    async with held(engine):
        storing = asyncio.create_task(backend.set_result("a", result_of("in time")))
        await asyncio.sleep(0)
    await storing
    assert (await backend.get_result("a")).return_value == "in time"


async def test_a_pool_that_is_full_of_the_backend_s_own_statements_is_no_one_else_s_fault(
    database: Database, start_backend: BackendFactory
) -> None:
    """What waits for them is tried again, like they themselves."""
    backend: Backend = await start_backend(
        pool_size=2, command_timeout=0.5, retry_timeout=LONG, notify=False
    )
    blocker = await asyncpg.connect(database.direct_dsn)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE taskiq_results")
    calls = [
        asyncio.create_task(call)
        for call in (
            backend.get_results(["a"]),
            backend.is_result_ready("a"),
            backend.set_result("b", result_of(1)),
            backend.runtime.database.transact(count_results, "count"),
        )
    ]

    async def is_repeated() -> bool:
        return backend.stats().retries >= len(calls)

    await eventually(is_repeated)
    await transaction.rollback()
    await blocker.close()
    await asyncio.gather(*calls)


async def count_results(connection: AsyncConnection) -> int:
    return int((await connection.execute(text("SELECT count(*) FROM taskiq_results"))).scalar_one())
