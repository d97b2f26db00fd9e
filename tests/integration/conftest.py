"""Fixtures of the tests of connections and of waiting."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import get_args

import pytest
from taskiq_pg.asyncpg import AsyncpgResultBackend

from taskiq_sa_pg.models import TaskIdField
from taskiq_sa_pg.waiting import Waiters
from tests.conftest import Database, NewDatabase
from tests.integration.databases import Checkouts, Databases, Log, address
from tests.integration.old_tables import old_backend
from tests.integration.waiters import Backend, Backends, table_of


@pytest.fixture(scope="module")
def waiting_tables(new_database: NewDatabase) -> Iterator[Database]:
    """A schema with a table for every kind of task id."""
    database = new_database()

    async def make() -> None:
        await database.create()
        for kind in get_args(TaskIdField):
            backend = Backend(
                database.dsn,
                table_name=table_of(database, kind),
                field_for_task_id=kind,
                run_migrations=True,
            )
            await backend.startup()
            await backend.shutdown()

    asyncio.run(make())
    yield database
    asyncio.run(database.drop())


@pytest.fixture
async def backends(
    waiting_tables: Database, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Backends]:
    """Starts backends; at the end nobody waits, no session is left and no callback has failed."""
    backends = Backends(waiting_tables)
    yield backends
    await backends.close()
    errors = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    # asyncpg 0.30 leaves a future of its own behind where it is closed in mid-statement.
    assert [text for text in errors if "ConnectionDoesNotExistError" not in text] == []


@pytest.fixture(params=["asyncpg", "psycopg"])
def each_driver(request: pytest.FixtureRequest, backends: Backends) -> Backends:
    """The same with each driver."""
    backends.driver = request.param
    return backends


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at regular times: what wakes a waiter is a notification."""

    async def see_nothing(_: Waiters) -> None: ...

    monkeypatch.setattr(Waiters, "look", see_nothing)


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notifications are lost, though the listener believes that it hears: who is woken, looks.

    Give the backend timings with short times between its looks.
    """
    monkeypatch.setattr(Waiters, "hear", lambda *_: None)


@pytest.fixture
async def log() -> Log:
    """For the statements of engines to which it is attached."""
    return Log()


@pytest.fixture(params=["asyncpg", "psycopg"])
def dsn(request: pytest.FixtureRequest, database: Database) -> str:
    """An address, for each driver, whose sessions are called `ours`."""
    return address(database, request.param)


@pytest.fixture
def checkouts() -> Checkouts:
    return Checkouts()


@pytest.fixture
async def databases(dsn: str) -> AsyncIterator[Databases]:
    databases = Databases(dsn)
    yield databases
    await databases.close()


@pytest.fixture
async def old(database: Database) -> AsyncIterator[AsyncpgResultBackend]:
    """A result backend of taskiq-postgres on the table `old`."""
    async with old_backend(database.direct_dsn) as backend:
        yield backend
