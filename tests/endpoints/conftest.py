"""Fixtures of the endpoints' tests."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from taskiq_sa_pg import build_models
from tests.conftest import Database, NewDatabase, shut_down
from tests.endpoints.served import Backend

MODELS = build_models()  # once, for it takes a while


@pytest.fixture(scope="module")
def tables(new_database: NewDatabase) -> Iterator[Database]:
    """A schema with the tables, which the tests of a file share."""
    database = new_database()

    async def make() -> None:
        await database.create()
        backend = Backend(database.dsn, run_migrations=True)
        await backend.startup()
        await backend.shutdown()

    asyncio.run(make())
    yield database
    asyncio.run(database.drop())


@pytest.fixture
async def backend(tables: Database) -> AsyncIterator[Backend]:
    """A backend that tracks, on the shared tables; nothing may be left in use at the end."""
    backend = Backend(tables.dsn, models=MODELS, check_schema="off", track="started")
    await backend.startup()
    yield backend
    await shut_down([backend])
