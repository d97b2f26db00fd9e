"""How iterations over results end, on purpose or not, and what others notice of them meanwhile."""

import asyncio
import gc
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from taskiq_sa_pg import NotStartedError, SQLAlchemyResultBackend, StorageError
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.database.stream import Stream
from tests.conftest import (
    BackendFactory,
    Database,
    assert_comes_to_rest,
    assert_nothing_checked_out,
    engine_of,
    eventually,
)
from tests.integration.databases import assert_disconnected
from tests.integration.test_search import assert_only_idle, fill, open_sessions
from tests.tasks import result_of

Backend = SQLAlchemyResultBackend[Any]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """All cursors, kept from the garbage collector, which would close them as well."""
    opened: list[Stream] = []
    real = Stream.open

    async def open_and_keep(stream: Stream, statement: Any, seconds: float) -> Any:
        opened.append(stream)
        return await real(stream, statement, seconds)

    monkeypatch.setattr(Stream, "open", open_and_keep)
    return opened


@pytest.fixture
async def backend(
    dsn: str, database: Database, start_backend: BackendFactory, opened: list[Stream]
) -> AsyncIterator[Backend]:
    """A backend on a thousand results, of which no cursor is left open at the end."""
    backend: Backend = await start_backend(dsn, command_timeout=10)
    await fill(database, 1000)
    yield backend
    await assert_only_idle(database)
    await assert_comes_to_rest(backend)
    assert backend.runtime.database.streams == 0


async def terminate_streams(database: Database) -> None:
    """Has the server end the sessions with a cursor."""
    ended = await database.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'ours' AND state = 'idle in transaction'"
    )
    assert ended


async def test_at_the_end_the_session_is_gone(backend: Backend, database: Database) -> None:
    found = 0
    async for _ in backend.iter_results(batch_size=500):
        found += 1
        if found == 1:
            assert await open_sessions(database) == ["idle in transaction"]
            assert backend.runtime.database.streams == 1

    async def is_closed() -> bool:
        return len(await database.sessions("ours")) <= 1

    await eventually(is_closed)


async def test_an_iteration_that_is_left_leaves_nothing(
    backend: Backend, database: Database
) -> None:
    async for _ in backend.iter_results(batch_size=10):
        assert await open_sessions(database) == ["idle in transaction"]
        break
    gc.collect()
    await assert_only_idle(database)
    async with aclosing(backend.iter_results(batch_size=10)) as results:
        await anext(results)
    await assert_only_idle(database)


async def test_a_consumer_that_raises_leaves_nothing(backend: Backend, database: Database) -> None:
    async def consume() -> None:
        async with aclosing(backend.iter_results(batch_size=10)) as results:
            async for _ in results:
                raise KeyError

    with pytest.raises(KeyError):
        await consume()
    await assert_only_idle(database)


async def test_one_that_is_never_begun_opens_nothing(
    backend: Backend, opened: list[Stream]
) -> None:
    results = backend.iter_results()
    await results.aclose()
    assert opened == []


async def test_a_cancelled_consumer_leaves_nothing(
    backend: Backend, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is, and if it is cancelled twice."""
    # psycopg then gives way to the event loop in every call, and not only when it is busy.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", 0, raising=False)
    outcomes = set()

    async def consume() -> int:
        async with aclosing(backend.iter_results(batch_size=300)) as results:
            return len([result async for result in results])

    for turns in range(0, 120, 4):
        consuming = asyncio.ensure_future(consume())
        for _ in range(turns):
            await asyncio.sleep(0)
        consuming.cancel()
        await asyncio.sleep(0)
        consuming.cancel()
        [outcome] = await asyncio.gather(consuming, return_exceptions=True)
        assert isinstance(outcome, int | asyncio.CancelledError), outcome
        outcomes.add(type(outcome))
    assert asyncio.CancelledError in outcomes
    await assert_only_idle(database)
    gc.collect()  # psycopg would warn of cursors that are open, which is an error here
    assert await consume() == 1000
    # psycopg was seen to forget connections whose making is cancelled: they never get a query.
    await database.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'ours' AND query = ''"
    )


async def test_a_connection_that_is_cut_ends_it_with_an_error(
    backend: Backend, database: Database
) -> None:
    """And not from the start again, where results would come twice."""
    found: list[str] = []

    async def consume() -> None:
        async for task_id, _ in backend.iter_results(batch_size=100):
            found.append(task_id)
            if len(found) == 150:
                await terminate_streams(database)

    with pytest.raises(StorageError, match="cannot read results in table taskiq_results: ") as e:
        await consume()
    assert re.search("terminating connection|closed|connection was lost", str(e.value))
    assert len(found) == len(set(found)) == 200
    await backend.set_result("after", result_of(7))
    assert len([task_id async for task_id, _ in backend.iter_results()]) == 1001


async def test_before_the_first_result_it_is_tried_again(
    backend: Backend, opened: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Stream.open

    async def cut_once(stream: Stream, statement: Any, seconds: float) -> Any:
        rows = await real(stream, statement, seconds)
        if len(opened) == 1:
            await stream.close()
            raise ConnectionResetError("cut")
        return rows

    monkeypatch.setattr(Stream, "open", cut_once)
    assert len([result async for result in backend.iter_results()]) == 1000
    assert len(opened) == 2


async def test_shutdown_ends_it(backend: Backend, database: Database) -> None:
    results = backend.iter_results(batch_size=10)
    for _ in range(10):
        await anext(results)
    await backend.shutdown()
    await assert_disconnected(database)
    with pytest.raises(NotStartedError, match="was shut down while results were read"):
        await anext(results)
    with pytest.raises(NotStartedError, match="not started"):
        backend.iter_results()
    await backend.startup()
    assert len([result async for result in backend.iter_results()]) == 1000


async def test_shutdown_waits_for_the_batch_that_is_under_way(
    backend: Backend, database: Database
) -> None:
    number = backend.models.Result.execution_time
    lock = sa.func.pg_advisory_xact_lock_shared(number.cast(sa.BigInteger))
    results = backend.iter_results(lock.cast(sa.Text) == "", batch_size=50)
    for _ in range(50):
        await anext(results)

    async def is_fetching() -> bool:
        return await open_sessions(database) == ["active"]

    holder = await asyncpg.connect(database.direct_dsn)
    try:
        await holder.execute("SELECT pg_advisory_lock(51)")
        fetching = asyncio.ensure_future(anext(results))
        await eventually(is_fetching)
        closing = asyncio.create_task(backend.shutdown())
        await asyncio.wait([closing], timeout=0.1)
        assert not closing.done()
    finally:
        await holder.close()
    task_id, _ = await fetching
    assert task_id == "task 51"
    await closing
    await assert_disconnected(database)
    await results.aclose()
    await backend.startup()


@pytest.mark.parametrize("owner", ["owned", "borrowed"])
async def test_slow_consumers_keep_nobody_waiting(
    dsn: str, database: Database, start_backend: BackendFactory, opened: list[Stream], owner: str
) -> None:
    """More of them than there are connections for statements."""
    await start_backend()  # makes the tables
    engine = None
    if owner == "owned":
        backend: Backend = await start_backend(dsn, max_connections=1, run_migrations=False)
    else:
        engine = make_engine(dsn, pool_size=1, max_overflow=0, pool_timeout=1)
        backend = await start_backend(engine=engine, run_migrations=False)
    await fill(database, 100)
    slow = [backend.iter_results(batch_size=10) for _ in range(6)]
    for results in slow:
        await anext(results)
    assert await open_sessions(database) == ["idle in transaction"] * 6
    assert_nothing_checked_out(engine_of(backend), kept=engine_of(backend).pool.checkedout())
    async with asyncio.timeout(20):
        for number in range(6):
            await asyncio.gather(
                *[backend.set_result(f"{number} {n}", result_of(n)) for n in range(50)]
            )
            assert await backend.is_result_ready(f"{number} 7")
            await anext(slow[number])
    for results in slow:
        await results.aclose()
    await assert_only_idle(database)
    if engine is not None:
        await backend.shutdown()
        await engine.dispose()


async def test_results_may_be_stored_and_forgotten_while_they_come(backend: Backend) -> None:
    """It shows those of one moment."""
    found = 0
    async for task_id, _ in backend.iter_results(batch_size=10):
        found += 1
        if found % 100 == 0:
            assert await backend.forget([task_id]) == 1
            await backend.set_result(f"new {found}", result_of(1))
    assert found == 1000
    assert len([result async for result in backend.iter_results()]) == 1000
