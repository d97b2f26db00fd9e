"""Fixtures of every suite: a real PostgreSQL, a schema per test, backends that leak nothing."""

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.embedded import postgres
from taskiq_sa_pg.timings import DEFAULT_TIMINGS
from tests.pooler import Pooler, left_out, pgbouncer

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

# For the processes that tests start: without bytecode their imports take three times as long.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell's background jobs ignore it, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pgbouncer",
        choices=["transaction", "session"],
        help="have the library connect through a PgBouncer in this mode",
    )
    parser.addoption(
        "--eager",
        action="store_true",
        help="give every event loop asyncio.eager_task_factory, of Python 3.12 and later",
    )


@pytest.fixture(autouse=True)
async def eager_tasks(request: pytest.FixtureRequest) -> None:
    """With --eager, tasks that begin before whoever makes them goes on."""
    if request.config.getoption("eager"):
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is about PgBouncer needs one."""
    is_about = collection_path.name == "pgbouncer" and collection_path.is_dir()
    return True if is_about and not config.getoption("pgbouncer") else None


# taskiq's InMemoryBroker then executes a task before kiq() returns.
NOT_EAGER = ("test_metadata_cost_no_statement", "test_other_middlewares_and_requeued_messages")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    parts: list[str] = []
    if mode := config.getoption("pgbouncer"):
        parts += left_out(mode)
    if config.getoption("eager"):
        parts += NOT_EAGER
    others = [item for item in items if any(part in item.nodeid for part in parts)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def server_dsn() -> Iterator[str]:
    """The address of a PostgreSQL: TASKIQ_SA_PG_TEST_DSN's, else that of an embedded one."""
    given = os.environ.get("TASKIQ_SA_PG_TEST_DSN")
    if given:
        yield given
        return
    settings = {"max_connections": "200", "max_prepared_transactions": "10"}
    with postgres(settings=settings) as server:
        yield server.dsn


@pytest.fixture(scope="session")
def pooler(request: pytest.FixtureRequest, server_dsn: str) -> Iterator[Pooler | None]:
    """With --pgbouncer, a PgBouncer in front of the server."""
    mode = request.config.getoption("pgbouncer")
    if not mode:
        yield None
        return
    with pgbouncer(server_dsn, mode=mode) as pooler:
        yield pooler


@dataclass(frozen=True)
class Database:
    """A schema of its own, which every connection to it finds first in its search_path."""

    server_dsn: str
    schema: str
    pooler: Pooler | None = None

    @property
    def direct_dsn(self) -> str:
        """In libpq's form, past any pooler; asyncpg serves it, the library's or not."""
        separator = "&" if "?" in self.server_dsn else "?"
        options = quote(f"-c search_path={self.schema}")
        return f"{self.server_dsn}{separator}options={options}"

    @property
    def dsn(self) -> str:
        """Where the library connects; asyncpg serves it."""
        return self.pooler.dsn(self.schema) if self.pooler else self.direct_dsn

    @property
    def psycopg_dsn(self) -> str:
        """The same, served by psycopg."""
        if self.pooler:
            return self.pooler.dsn(self.schema, "psycopg")
        return self.direct_dsn.replace("postgresql://", "postgresql+psycopg://", 1)

    def dsn_of(self, driver: str) -> str:
        """The same, served by this driver."""
        return self.dsn if driver == "asyncpg" else self.psycopg_dsn

    @property
    def is_deaf(self) -> bool:
        """Whether no notification arrives there."""
        return self.pooler is not None and self.pooler.mode == "transaction"

    async def create(self) -> None:
        """Makes the schema; with a pooler, which sets no search_path, also a user who has it."""
        await self.fetch(f"CREATE SCHEMA {self.schema}")
        if self.pooler:
            await self.fetch(f"CREATE ROLE {self.schema} SUPERUSER LOGIN")
            await self.fetch(f"ALTER ROLE {self.schema} SET search_path = {self.schema}")

    async def drop(self) -> None:
        """Drops what create() has made, and everything in it."""
        await self.fetch(f"DROP SCHEMA {self.schema} CASCADE")
        if self.pooler:
            await self.fetch(f"DROP OWNED BY {self.schema}")
            await self.fetch(f"DROP ROLE {self.schema}")

    async def fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Runs a query past the library, on a connection of its own."""
        connection = await asyncpg.connect(self.direct_dsn)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query, *args)
            return rows
        finally:
            await connection.close()

    async def sessions(self, application_name: str) -> list[str]:
        """The states of the sessions of that name: the server's, or else the pooler's."""
        query = "SELECT state FROM pg_stat_activity WHERE application_name = $1 AND usename <> $2"
        rows = await self.fetch(query, application_name, self.schema)
        clients = self.pooler.clients(self.schema) if self.pooler else []
        pooled = [row for row in clients if row["application_name"] == application_name]
        return [row["state"] for row in [*rows, *pooled]]


async def eventually(
    is_so: Callable[[], Awaitable[bool]], seconds: float = 10, pause: float = 0.01
) -> None:
    """Asks again until it is so, for what the server or another process does in its own time."""
    deadline = time.monotonic() + seconds
    while not await is_so():
        assert time.monotonic() < deadline, "it did not come to be so in time"
        await asyncio.sleep(pause)


NewDatabase = Callable[[], Database]


@pytest.fixture(scope="session")
def new_database(server_dsn: str, pooler: Pooler | None) -> NewDatabase:
    """Names a schema that is nobody else's; create() makes it."""
    return lambda: Database(server_dsn, f"test_{uuid.uuid4().hex}", pooler)


@pytest.fixture
async def database(new_database: NewDatabase) -> AsyncIterator[Database]:
    """An empty schema, dropped after the test."""
    database = new_database()
    await database.create()
    yield database
    await database.drop()


@pytest.fixture
async def other_database(new_database: NewDatabase) -> AsyncIterator[Database]:
    """A second empty schema."""
    database = new_database()
    await database.create()
    yield database
    await database.drop()


def engine_of(backend: SQLAlchemyResultBackend[Any]) -> AsyncEngine:
    """The engine that a started backend works on, owned or borrowed."""
    return backend.runtime.database.engine


def assert_nothing_checked_out(engine: AsyncEngine, kept: int = 0) -> None:
    """No connection of the pool is in use, but for those kept; other pools do not count."""
    if isinstance(engine.pool, QueuePool):
        assert engine.pool.checkedout() == kept, engine.pool.status()


def assert_nothing_in_use(backend: SQLAlchemyResultBackend[Any]) -> None:
    """Nothing runs, and only connections of the backend's own engine are kept for the next."""
    database = backend.runtime.database
    assert database.kept == 0 or database.is_owned
    assert_nothing_checked_out(database.engine, database.kept)


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
        if backend.is_started:
            await assert_comes_to_rest(backend)
        await backend.shutdown()


BackendFactory = Callable[..., Any]


@pytest.fixture
async def start_backend(database: Database) -> AsyncIterator[BackendFactory]:
    """Makes and starts backends on the test's schema, with their arguments and `timings`.

    At the end none may hold a connection.
    """
    started: list[SQLAlchemyResultBackend[Any]] = []

    async def start(*args: Any, **kwargs: Any) -> SQLAlchemyResultBackend[Any]:
        if not args and "dsn" not in kwargs and "engine" not in kwargs:
            kwargs["dsn"] = database.dsn
        kwargs.setdefault("run_migrations", True)
        timings = kwargs.pop("timings", DEFAULT_TIMINGS)
        backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(*args, **kwargs)
        backend.settings = replace(backend.settings, timings=timings)
        await backend.startup()
        started.append(backend)
        return backend

    yield start
    await shut_down(started)
