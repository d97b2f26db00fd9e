"""Fixtures of the tests of connections and of waiting."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import get_args

import pytest
from taskiq_pg.asyncpg import AsyncpgResultBackend

from taskiq_sa_pg import SQLAlchemyBroker
from taskiq_sa_pg.models import TaskIdField
from taskiq_sa_pg.waiting import Waiters
from tests.conftest import Database, NewDatabase
from tests.integration.brokers import PAIRS, Brokers, make_tables
from tests.integration.databases import Checkouts, Databases, Log, address, assert_disconnected
from tests.integration.old_tables import old_backend
from tests.integration.schedulers import Schedulers
from tests.integration.shops import Shop
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
async def databases(dsn: str, database: Database) -> AsyncIterator[Databases]:
    databases = Databases(dsn)
    yield databases
    await databases.close()
    await assert_disconnected(database, collects=True)


@pytest.fixture
async def old(database: Database) -> AsyncIterator[AsyncpgResultBackend]:
    """A result backend of taskiq-postgres on the table `old`."""
    async with old_backend(database.direct_dsn) as backend:
        yield backend


@pytest.fixture(params=["asyncpg", "psycopg"])
async def schedulers(
    request: pytest.FixtureRequest, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Schedulers]:
    """Schedulers with each driver; at the end none is left open."""
    schedulers = Schedulers(database, request.param, monkeypatch)
    await schedulers.make_tables()
    yield schedulers
    await schedulers.stop()


@pytest.fixture(scope="module")
def broker_tables(new_database: NewDatabase) -> Iterator[Database]:
    """A schema with the tables of a broker and its results, for every kind of task id."""
    database = new_database()

    async def make() -> None:
        await database.create()
        await make_tables(database, *get_args(TaskIdField))

    asyncio.run(make())
    yield database
    asyncio.run(database.drop())


@pytest.fixture
async def brokers(
    broker_tables: Database, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Brokers]:
    """Starts brokers; at the end none holds a connection, and no callback has failed."""
    brokers = Brokers(broker_tables)
    yield brokers
    await brokers.close()
    failed = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio"]
    # asyncpg 0.30 leaves a future of its own behind where it is closed in mid-statement.
    known = "ConnectionDoesNotExistError", "a bug of a middleware"
    assert [text for text in failed if not any(part in text for part in known)] == []


@pytest.fixture(params=PAIRS, ids="-".join)
def each_pair(request: pytest.FixtureRequest, brokers: Brokers) -> Brokers:
    """The same with each driver, on an engine of its own or of the application's."""
    brokers.driver, brokers.owner = request.param
    return brokers


StartBroker = Callable[..., Awaitable[SQLAlchemyBroker]]


@pytest.fixture
def start_broker(each_pair: Brokers) -> StartBroker:
    """Makes and starts brokers with each driver; arguments are those of Brokers.make()."""
    return each_pair.start


@pytest.fixture(scope="module")
def shop_tables(new_database: NewDatabase) -> Iterator[Database]:
    """A schema with the tables of a shop: its orders, the queue and the results."""
    database = new_database()
    asyncio.run(Shop(database).create())
    yield database
    asyncio.run(database.drop())


@pytest.fixture
async def shop(shop_tables: Database) -> AsyncIterator[Shop]:
    """An empty shop; at the end no connection of it is in use."""
    shop = Shop(shop_tables)
    yield shop
    await shop.close()
    await shop_tables.fetch("TRUNCATE orders, shop, shop_queue, shop_status")


@pytest.fixture(params=["asyncpg", "psycopg"])
def each_shop(request: pytest.FixtureRequest, shop: Shop) -> Shop:
    """The same with each driver."""
    shop.driver = request.param
    return shop
