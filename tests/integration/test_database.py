"""What an operation costs on the wire, and what owned and borrowed engines are left like."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg import ResultDecodeError, SQLAlchemyResultBackend
from taskiq_sa_pg.database import make_engine, parse_dsn
from tests.conftest import (
    BackendFactory,
    Database,
    assert_comes_to_rest,
    assert_nothing_checked_out,
)
from tests.integration.databases import assert_disconnected
from tests.tasks import result_of

Backend = SQLAlchemyResultBackend[Any]


PROGRESS: TaskProgress[Any] = TaskProgress(state="running", meta={"done": 1})
MANY = [str(i) for i in range(200)]

OPERATIONS: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    "set_result": lambda b: b.set_result("1", result_of("x" * 1000)),
    "is_result_ready": lambda b: b.is_result_ready("1"),
    "get_result": lambda b: b.get_result("1"),
    "get_results": lambda b: b.get_results(MANY),
    "set_progress": lambda b: b.set_progress("1", PROGRESS),
    "get_progress": lambda b: b.get_progress("1"),
}


class Wire:
    """A Unix socket before the server, which notes what the server says.

    Attributes:
        round_trips: How often it was ready for the next query.
        commands: What it completed: "INSERT", "BEGIN", ...
    """

    round_trips: int
    commands: list[str]

    def __init__(self) -> None:
        self.forget()
        self._pumps: set[asyncio.Task[None]] = set()

    def forget(self) -> None:
        """Begins to note anew."""
        self.round_trips, self.commands = 0, []

    @contextlib.asynccontextmanager
    async def before(self, database: Database) -> AsyncIterator[str]:
        """The DSN that leads through here."""
        address = parse_dsn(database.dsn)
        [(host, port)] = address.hosts

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if host.startswith("/"):
                path = f"{host}/.s.PGSQL.{port or 5432}"
                server = await asyncio.open_unix_connection(path)
            else:
                server = await asyncio.open_connection(host, port or 5432)
            self._start(self._send(reader, server[1]))
            self._start(self._answer(server[0], writer))

        with tempfile.TemporaryDirectory(dir="/tmp") as directory:
            path = Path(directory, ".s.PGSQL.5432")
            async with await asyncio.start_unix_server(serve, path):
                through = URL.create(
                    "postgresql",
                    address.username,
                    address.password,
                    database=address.database,
                    query={**address.options, "host": directory, "port": "5432"},
                )
                try:
                    yield through.render_as_string(hide_password=False)
                finally:
                    # When a test fails, its backend is still connected.
                    for pump in self._pumps:
                        pump.cancel()
                    await asyncio.gather(*self._pumps, return_exceptions=True)

    def _start(self, pump: Any) -> None:
        self._pumps.add(asyncio.create_task(pump))

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while sent := await reader.read(65536):
                writer.write(sent)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with (
            contextlib.suppress(asyncio.IncompleteReadError, ConnectionError),
            contextlib.closing(writer),
        ):
            while True:
                head = await reader.readexactly(5)
                body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
                self._note(head[:1], body)
                writer.write(head + body)

    def _note(self, kind: bytes, body: bytes) -> None:
        # https://www.postgresql.org/docs/18/protocol-message-formats.html
        if kind == b"Z":  # ReadyForQuery
            self.round_trips += 1
        if kind == b"C":  # CommandComplete
            self.commands.append(body.rstrip(b"\0").decode().split()[0])


@pytest.fixture
async def wire() -> Wire:
    return Wire()


async def warm_up(backend: Backend) -> None:
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in MANY])
    for operation in OPERATIONS.values():
        for _ in range(8):  # psycopg prepares a statement when it comes for the sixth time
            await operation(backend)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_each_operation_is_one_statement_and_one_round_trip(
    driver: str, database: Database, start_backend: BackendFactory, wire: Wire
) -> None:
    async with wire.before(database) as address:
        dsn = address.replace("postgresql:", f"postgresql+{driver}:")
        # A notification would come in a statement of its own, in the background.
        backend: Backend = await start_backend(dsn, pool_size=1, notify=False)
        await warm_up(backend)
        for name, operation in OPERATIONS.items():
            wire.forget()
            await operation(backend)
            assert (name, len(wire.commands), wire.round_trips) == (name, 1, 1)
        await backend.shutdown()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_deleting_read_is_one_statement_in_one_transaction(
    driver: str, database: Database, start_backend: BackendFactory, wire: Wire
) -> None:
    async with wire.before(database) as address:
        dsn = address.replace("postgresql:", f"postgresql+{driver}:")
        backend: Backend = await start_backend(dsn, keep_results=False, pool_size=1, notify=False)
        for _ in range(8):
            await backend.set_result("1", result_of(1))
            await backend.get_result("1")
        await backend.set_result("1", result_of(1))
        wire.forget()
        await backend.get_result("1")
        assert (wire.commands, wire.round_trips) == (["BEGIN", "SELECT", "COMMIT"], 3)
        await backend.shutdown()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_only_a_deleting_read_opens_a_transaction(
    driver: str, database: Database, start_backend: BackendFactory, wire: Wire
) -> None:
    """Notifications, too, go in statements of their own."""
    async with wire.before(database) as address:
        dsn = address.replace("postgresql:", f"postgresql+{driver}:")
        backend: Backend = await start_backend(dsn, keep_results=False, pool_size=1)
        for name, operation in OPERATIONS.items():
            await backend.set_result("1", result_of(1))
            await operation(backend)
            await assert_comes_to_rest(backend)
            wire.forget()
            await backend.set_result("1", result_of(1))
            await operation(backend)
            transactions = [c for c in wire.commands if c in {"BEGIN", "COMMIT", "ROLLBACK"}]
            expected = ["BEGIN", "COMMIT"] if name.startswith("get_result") else []
            assert (name, transactions) == (name, expected)
        await backend.shutdown()


@pytest.fixture(params=["asyncpg", "psycopg"])
async def application(
    request: pytest.FixtureRequest, database: Database
) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Makes engines of an application, with one connection each."""
    made: list[AsyncEngine] = []

    def make(**kwargs: Any) -> AsyncEngine:
        dsn = database.dsn_of(request.param)
        engine = make_engine(dsn, pool_size=1, **kwargs)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        await engine.dispose()


async def test_a_borrowed_engine_is_never_disposed(
    application: Callable[..., AsyncEngine], database: Database
) -> None:
    engine = application()
    pool = engine.pool
    backend = Backend(engine=engine, run_migrations=True)
    await backend.startup()
    await backend.set_result("1", result_of(1))
    [session] = await sessions_on(engine)
    await backend.shutdown()
    await backend.shutdown()
    assert engine.pool is pool
    assert await sessions_on(engine) == [session]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_every_connection_asks_for_a_pooler(
    driver: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where the settings say what would come of it."""
    connection: Any = {"asyncpg": asyncpg.Connection, "psycopg": psycopg.AsyncConnection}[driver]
    execute, asked = connection.execute, []

    async def note(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        if "SELECT WHERE pg_backend_pid" in query:
            asked.append(query)
        return await execute(self, query, *args, **kwargs)

    monkeypatch.setattr(connection, "execute", note)
    address = make_url(database.direct_dsn).set(drivername=f"postgresql+{driver}")
    host = address.query.get("host", address.host)
    other = address.update_query_dict({"host": f"{host},{host}"})
    dsns = [address]
    engine = make_engine(lambda: dsns[-1], poolclass=NullPool)
    for number in range(1, 4):
        if number > 2:
            dsns.append(other)
        await sessions_on(engine)
        assert len(asked) == number
    setting = {"asyncpg": {"statement_cache_size": 9}, "psycopg": {"prepare_threshold": 9}}[driver]
    for source in (
        make_engine(address, poolclass=NullPool, connect_args=setting),
        make_engine(
            address.update_query_dict({name: str(value) for name, value in setting.items()}),
            poolclass=NullPool,
        ),
    ):
        await sessions_on(source)
    assert len(asked) == 3


async def sessions_on(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return list(await connection.scalars(text("SELECT pg_backend_pid()")))


async def test_a_borrowed_engine_stays_usable_when_startup_fails(
    application: Callable[..., AsyncEngine],
) -> None:
    engine = application()
    [session] = await sessions_on(engine)
    with pytest.raises(Exception, match="taskiq_results"):
        await Backend(engine=engine).startup()
    assert await sessions_on(engine) == [session]
    assert_nothing_checked_out(engine)


async def how_transactions_are(engine: AsyncEngine) -> tuple[str, int]:
    """The isolation level of the engine's users, and how many of one row a rollback leaves."""
    async with engine.connect() as connection:
        level = await connection.scalar(text("SHOW transaction_isolation"))
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        await connection.rollback()
        left = await connection.scalar(text("SELECT count(*) FROM t"))
    return str(level), int(left)


async def test_other_users_keep_their_transactions_when_a_call_is_cancelled(
    application: Callable[..., AsyncEngine], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # psycopg then gives way to the event loop in every call, and not only when it is busy.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", 0, raising=False)
    engine = application()
    await database.fetch("CREATE TABLE t (i integer)")
    backend = Backend(engine=engine, keep_results=False, run_migrations=True)
    await backend.startup()
    for call in (partial(backend.is_result_ready, "1"), partial(backend.get_results, ["1"])):
        turns, is_cancelled = 0, True
        while is_cancelled or turns <= 5:
            calling = asyncio.create_task(call())
            for _ in range(turns):
                await asyncio.sleep(0)
            calling.cancel()
            await asyncio.wait([calling])
            is_cancelled = calling.cancelled()
            # SQLAlchemy 2.0 was seen to swallow an early cancellation.
            assert is_cancelled or turns >= 5 or sqlalchemy.__version__.startswith("2.0.")
            assert await how_transactions_are(engine) == ("read committed", 0)
            turns += 1 + turns // 3
    await backend.shutdown()
    assert_nothing_checked_out(engine)


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
async def test_a_deleting_read_is_a_transaction_whatever_the_engines_default(
    application: Callable[..., AsyncEngine], database: Database, level: str
) -> None:
    backend = Backend(
        engine=application(isolation_level=level), keep_results=False, run_migrations=True
    )
    await backend.startup()
    await backend.set_result("1", result_of(1))
    await database.fetch("UPDATE taskiq_results SET return_value = 'garbage'")
    with pytest.raises(ResultDecodeError):
        await backend.get_result("1")
    assert await backend.is_result_ready("1")
    await backend.set_result("1", result_of(1))
    readers = await asyncio.gather(
        *[backend.get_result("1") for _ in range(10)], return_exceptions=True
    )
    assert sum(isinstance(reader, TaskiqResult) for reader in readers) == 1
    await backend.shutdown()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_null_pool_will_do(driver: str, database: Database) -> None:
    dsn = f"{database.dsn_of(driver)}&application_name=null"
    backend = Backend(engine=make_engine(dsn, poolclass=NullPool), run_migrations=True)
    await backend.startup()
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in MANY[:10]])
    assert set(await backend.get_results(MANY)) == set(MANY[:10])
    await backend.shutdown()
    await assert_disconnected(database, "null")
