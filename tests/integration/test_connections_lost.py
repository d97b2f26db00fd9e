"""What becomes of connections that are closed, cancelled, listened on or left behind."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from taskiq_sa_pg import StorageError
from taskiq_sa_pg.background import end_task
from taskiq_sa_pg.database import Database as Connected
from tests.conftest import Database, assert_nothing_checked_out, eventually
from tests.integration.databases import (
    Databases,
    address,
    assert_disconnected,
    each_owner,
    session_of,
    session_of_transaction,
)


async def terminate(database: Database) -> None:
    """Has the server close all our sessions, and waits until it did."""
    await database.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ours'"
    )
    await assert_disconnected(database)


@each_owner
@pytest.mark.parametrize(
    "run", [session_of, session_of_transaction], ids=["statement", "transaction"]
)
async def test_a_connection_that_the_server_has_closed_is_not_used(
    run: Callable[[Connected], Awaitable[int]], owner: str, database: Database
) -> None:
    """Which asyncpg notices by itself, be it kept or in the pool."""
    databases = Databases(address(database, "asyncpg"))
    opened = await databases.open(owner, retry_timeout=0)
    await asyncio.gather(*[session_of(opened) for _ in range(10)])
    before = await database.fetch(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'ours'"
    )
    assert len(before) == 4
    await terminate(database)
    for _ in range(5):
        assert await run(opened) not in {row["pid"] for row in before}
    await databases.close()


@each_owner
async def test_psycopg_notices_by_one_failed_statement_that_the_server_has_closed_it(
    owner: str, database: Database
) -> None:
    """Which is tried again, usually; none of the others that were open is tried at all."""
    databases = Databases(address(database, "psycopg"))
    opened = await databases.open(owner, retry_timeout=0)
    await asyncio.gather(*[session_of(opened) for _ in range(10)])
    await terminate(database)
    with pytest.raises(StorageError, match=r"terminating connection|closed"):
        await session_of(opened)
    for _ in range(5):
        await session_of(opened)
    await databases.close()


READ_ONLY = "BEGIN RAISE 'now a standby' USING ERRCODE = '25006'; END"
SILENT = "BEGIN PERFORM pg_sleep(5); END"


@each_owner
@pytest.mark.parametrize("failing", [READ_ONLY, SILENT], ids=["read-only", "silent"])
async def test_after_a_server_that_is_of_no_use_all_connections_are_replaced(
    failing: str, owner: str, databases: Databases, database: Database
) -> None:
    """Those that are alive, too: they may lead to the old primary, or through a dead network."""
    await database.fetch(f"CREATE FUNCTION fail() RETURNS int LANGUAGE plpgsql AS $${failing}$$")
    opened = await databases.open(owner, retry_timeout=0, command_timeout=0.5)
    await asyncio.gather(*[session_of(opened) for _ in range(10)])
    before = await database.fetch(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'ours'"
    )
    assert len(before) == 4
    with pytest.raises(StorageError, match=r"standby|did not answer"):
        await opened.fetch(sa.select(sa.func.fail()), {}, "fail")
    sessions = await asyncio.gather(*[session_of(opened) for _ in range(10)])
    sessions += [await session_of_transaction(opened)]
    assert not set(sessions) & {row["pid"] for row in before}


@each_owner
@pytest.mark.parametrize(
    "run", [session_of, session_of_transaction], ids=["statement", "transaction"]
)
async def test_a_cancelled_call_leaves_no_connection_in_use(
    run: Callable[[Connected], Awaitable[int]],
    owner: str,
    databases: Databases,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # psycopg then gives way to the event loop in every call, and not only when it is busy.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", 0, raising=False)
    opened = await databases.open(owner, pool_size=1, pool_timeout=1)
    ended = cancelled = 0
    while ended < 3:
        calling = asyncio.ensure_future(run(opened))
        for _ in range(ended + cancelled):  # each time a turn of the event loop later
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.sleep(0)
        calling.cancel()  # by somebody else
        [outcome] = await asyncio.gather(calling, return_exceptions=True)
        assert isinstance(outcome, int | asyncio.CancelledError), outcome
        ended += isinstance(outcome, int)
        cancelled += isinstance(outcome, asyncio.CancelledError)
        assert await session_of(opened)
    assert cancelled

    async def is_idle() -> bool:
        return set(await database.sessions("ours")) <= {"idle"}

    await eventually(is_idle)
    assert_nothing_checked_out(opened.engine, opened.kept)
    pool = opened.engine.pool
    await opened.close()
    assert isinstance(pool, sa.QueuePool)
    assert pool.checkedout() == 0


@pytest.mark.parametrize(
    "run", [session_of, session_of_transaction], ids=["statement", "transaction"]
)
async def test_who_is_cancelled_while_it_connects_keeps_no_place(
    run: Callable[[Connected], Awaitable[int]], databases: Databases, database: Database
) -> None:
    opened = await databases.open("borrowed", poolclass=NullPool, max_connections=1)
    turns, is_cancelled = 0, True
    while is_cancelled:
        calling = asyncio.ensure_future(run(opened))
        for _ in range(turns):
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.wait([calling])
        is_cancelled = calling.cancelled()
        async with asyncio.timeout(5):
            assert await session_of(opened)
        turns += 1 + turns // 2
    del calling
    await assert_disconnected(database, collects=True)


@each_owner
async def test_who_is_cancelled_while_a_statement_runs_ends_it(
    owner: str, databases: Databases, database: Database
) -> None:
    opened = await databases.open(owner, pool_size=1, pool_timeout=5)
    waiting = sa.select(sa.cast(sa.func.pg_sleep(600), sa.Text))
    calling = asyncio.create_task(opened.fetch(waiting, {}, "wait"))

    async def is_running() -> bool:
        return await database.sessions("ours") == ["active"]

    await eventually(is_running)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await session_of(opened)

    async def is_over() -> bool:
        return "active" not in await database.sessions("ours")

    await eventually(is_over)


@each_owner
async def test_listening_takes_no_place_of_the_pool(
    owner: str, databases: Databases, database: Database
) -> None:
    opened = await databases.open(owner, pool_size=1, pool_timeout=0.5)
    await session_of(opened)
    async with opened.listening() as one, opened.listening() as other:
        await asyncio.gather(
            *[
                call
                for _ in range(5)
                for call in (session_of(opened), session_of_transaction(opened))
            ]
        )
        assert len({id(one), id(other)}) == 2
        assert len(await database.sessions("ours")) == 3
    await assert_only_the_pools_sessions(opened, database)


async def assert_only_the_pools_sessions(opened: Connected, database: Database) -> None:
    async def is_one_left() -> bool:
        return await database.sessions("ours") == ["idle"]

    await eventually(is_one_left)
    assert await session_of(opened)


@pytest.mark.parametrize(
    ("end", "owner"),
    [("cancelled", "owned"), ("failed", "borrowed"), ("lost", "owned"), ("lost", "borrowed")],
)
async def test_a_listening_connection_is_closed_whatever_ends_it(
    end: str, owner: str, databases: Databases, database: Database
) -> None:
    opened = await databases.open(owner, pool_size=1)
    is_listening = asyncio.Event()
    is_to_fail = asyncio.Event()

    async def listen() -> None:
        async with opened.listening():
            is_listening.set()
            await is_to_fail.wait()
            raise ZeroDivisionError

    listening = asyncio.create_task(listen())
    await is_listening.wait()
    await session_of(opened)
    assert len(await database.sessions("ours")) == 2
    if end == "cancelled":
        listening.cancel()
    if end == "lost":
        await terminate(database)
    is_to_fail.set()
    expected = asyncio.CancelledError if end == "cancelled" else ZeroDivisionError
    with pytest.raises(expected):
        await listening
    if end == "lost":
        with suppress(StorageError):  # psycopg notices by a failure
            await session_of(opened)
    await session_of(opened)
    await assert_only_the_pools_sessions(opened, database)


async def test_who_is_cancelled_on_the_way_to_listen_leaves_no_connection(
    databases: Databases, database: Database
) -> None:
    opened = await databases.open("borrowed", pool_size=1, pool_timeout=1)
    is_listening = asyncio.Event()

    async def listen() -> None:
        async with opened.listening():
            is_listening.set()
            await asyncio.Event().wait()

    turns = 0
    while not is_listening.is_set():
        turns += 1 + turns // 8
        listening = asyncio.create_task(listen())
        for _ in range(turns):
            await asyncio.sleep(0)
        await end_task(listening)
        assert listening.cancelled()
        assert_nothing_checked_out(opened.engine)
    await session_of(opened)
    del listening
    gc.collect()  # psycopg leaves a connection whose opening is cancelled to it
    await assert_only_the_pools_sessions(opened, database)


@each_owner
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_listening_leads_to_its_own_address(
    driver: str, owner: str, databases: Databases, database: Database
) -> None:
    """With its own driver, too."""
    opened = await databases.open(owner, listen_dsn=address(database, driver, "listening"))
    async with opened.listening() as connection:
        assert type(connection).__module__.startswith(driver)
        assert len(await database.sessions("listening")) == 1
        assert await database.sessions("ours") == []
        await session_of(opened)
    await assert_disconnected(database, "listening")


async def test_an_address_that_nobody_answers_at_is_a_storage_error(
    databases: Databases, database: Database
) -> None:
    opened = await databases.open(listen_dsn=database.dsn.replace("host=/", "host=/no/such/"))
    with pytest.raises(StorageError, match=r"cannot listen for notifications: .*No such file"):
        async with opened.listening():
            pass


COUNT = sa.select(sa.func.count()).select_from(sa.table("t"))


async def count(opened: Connected) -> None:
    await opened.fetch(COUNT, {}, "count")


async def count_in_a_transaction(opened: Connected) -> None:
    await opened.transact(lambda connection: connection.execute(COUNT), "count")


@each_owner
@pytest.mark.parametrize("run", [count, count_in_a_transaction])
async def test_what_runs_while_a_database_is_closed_ends_first_and_leaves_no_session(
    run: Callable[[Connected], Awaitable[None]],
    owner: str,
    databases: Databases,
    database: Database,
) -> None:
    opened = await databases.open(owner, max_connections=2)
    await database.fetch("CREATE TABLE t (i integer)")

    async def are_running() -> bool:
        return await database.sessions("ours") == ["active"] * 2

    other = await asyncpg.connect(database.dsn)
    async with other.transaction():
        await other.execute("LOCK TABLE t")
        running = [asyncio.create_task(run(opened)) for _ in range(3)]  # the last waits for a place
        await eventually(are_running)
        closing = asyncio.create_task(opened.close())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not closing.done()
    await other.close()
    await closing
    assert all(task.done() for task in running)
    await asyncio.gather(*running)
    await databases.close()
    await assert_disconnected(database)


@pytest.fixture
def loops_end(database: Database) -> Iterator[None]:
    """The end of a test without an event loop of its own: no session is left."""
    yield
    asyncio.run(assert_disconnected(database))


@pytest.mark.usefixtures("loops_end")
def test_an_event_loop_that_ends_without_a_shutdown_leaves_no_session(
    dsn: str, database: Database
) -> None:
    """Neither of what was kept, nor of what was running or listening."""

    async def run() -> None:
        opened = Connected(dsn)
        await opened.open()
        listening = opened.listening()
        await listening.__aenter__()
        await asyncio.gather(*[session_of(opened) for _ in range(10)])
        waiting = sa.select(sa.cast(sa.func.pg_sleep(600), sa.Text))
        running = asyncio.create_task(opened.fetch(waiting, {}, "wait"))

        async def is_running() -> bool:
            return "active" in await database.sessions("ours")

        await eventually(is_running)
        assert len(await database.sessions("ours")) == 5
        assert not running.done()

    asyncio.run(run())


async def test_a_null_pools_connections_are_closed(
    databases: Databases, database: Database
) -> None:
    opened = await databases.open("borrowed", poolclass=NullPool, max_connections=2)
    await asyncio.gather(*[session_of(opened) for _ in range(10)])
    await assert_disconnected(database)
