"""Fixtures of every suite: a real PostgreSQL, a schema per test, backends that leak nothing."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool, QueuePool

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.embedded import postgres

# No time limits, which a busy machine breaks; in CI the same examples every time.
settings.register_profile(
    "project",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    database=None,
)
settings.load_profile("project")


@pytest.fixture(scope="session")
def server_dsn() -> Iterator[str]:
    """The address of a PostgreSQL: TASKIQ_SA_PG_TEST_DSN's, else that of an embedded one."""
    given = os.environ.get("TASKIQ_SA_PG_TEST_DSN")
    if given:
        yield given
        return
    with postgres(settings={"max_connections": "200"}) as server:
        yield server.dsn


@dataclass(frozen=True)
class Database:
    """A schema of its own, which every connection to `dsn` finds first in its search_path."""

    server_dsn: str
    schema: str

    @property
    def dsn(self) -> str:
        """In libpq's form; asyncpg serves it."""
        separator = "&" if "?" in self.server_dsn else "?"
        options = quote(f"-c search_path={self.schema}")
        return f"{self.server_dsn}{separator}options={options}"

    @property
    def psycopg_dsn(self) -> str:
        """The same, served by psycopg."""
        return self.dsn.replace("postgresql://", "postgresql+psycopg://", 1)

    async def fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Runs a query past the library, on a connection of its own."""
        connection = await asyncpg.connect(self.dsn)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query, *args)
            return rows
        finally:
            await connection.close()

    async def sessions(self, application_name: str) -> list[str]:
        """The states of the server's sessions of that name."""
        query = "SELECT state FROM pg_stat_activity WHERE application_name = $1"
        return [row["state"] for row in await self.fetch(query, application_name)]


async def eventually(is_so: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
    """Asks again until it is so, for what the server does in its own time."""
    deadline = time.monotonic() + seconds
    while not await is_so():
        assert time.monotonic() < deadline, "it did not come to be so in time"
        await asyncio.sleep(0.01)


@pytest.fixture
async def database(server_dsn: str) -> AsyncIterator[Database]:
    """An empty schema, dropped after the test."""
    database = Database(server_dsn, f"test_{uuid.uuid4().hex}")
    await database.fetch(f"CREATE SCHEMA {database.schema}")
    yield database
    await database.fetch(f"DROP SCHEMA {database.schema} CASCADE")


def engine_of(backend: SQLAlchemyResultBackend[Any]) -> AsyncEngine:
    """The engine that a started backend works on, owned or borrowed."""
    engine = backend._store._engine
    assert engine is not None
    return engine


def assert_nothing_checked_out(engine: AsyncEngine, kept: int = 0) -> None:
    """No connection of the pool is in use, but for those kept; of a NullPool none is known."""
    if isinstance(engine.pool, NullPool):
        return
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedout() == kept, engine.pool.status()


def assert_nothing_in_use(backend: SQLAlchemyResultBackend[Any]) -> None:
    """Nothing runs, and only connections of the backend's own engine are kept for the next."""
    connections = backend._store._connections
    assert connections is not None
    assert connections.kept == 0 or backend._store._borrowed is None
    assert_nothing_checked_out(engine_of(backend), connections.kept)


async def assert_comes_to_rest(backend: SQLAlchemyResultBackend[Any]) -> None:
    """Nothing is left in use once the statements in the background, such as NOTIFY, are over."""

    async def is_at_rest() -> bool:
        try:
            assert_nothing_in_use(backend)
        except AssertionError:
            return False
        return True

    await eventually(is_at_rest)


async def shut_down(backends: Iterable[SQLAlchemyResultBackend[Any]]) -> None:
    """Ends the backends of a test, none of which may hold a connection."""
    for backend in backends:
        if backend._store._engine is not None:
            await assert_comes_to_rest(backend)
        await backend.shutdown()


BackendFactory = Callable[..., Any]


@pytest.fixture
async def start_backend(database: Database) -> AsyncIterator[BackendFactory]:
    """Makes and starts backends on the test's schema; at the end none may hold a connection."""
    started: list[SQLAlchemyResultBackend[Any]] = []

    async def start(*args: Any, **kwargs: Any) -> SQLAlchemyResultBackend[Any]:
        if not args and "dsn" not in kwargs and "engine" not in kwargs:
            kwargs["dsn"] = database.dsn
        kwargs.setdefault("run_migrations", True)
        backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(*args, **kwargs)
        await backend.startup()
        started.append(backend)
        return backend

    yield start
    await shut_down(started)
