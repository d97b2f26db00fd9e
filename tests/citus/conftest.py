"""A Citus cluster that somebody has started, and tables on it in each layout."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from taskiq_sa_pg import Models
from tests.citus.places import DISTRIBUTE, LAYOUTS, Place, Tables, models_of
from tests.commands import run_taskiq_sa_pg

VARIABLE = "TASKIQ_SA_PG_CITUS_DSN"


@pytest.fixture(scope="session")
def address() -> str:
    """The cluster's coordinator."""
    given = os.environ.get(VARIABLE)
    if not given:
        # Not skipped: that would pass without a test.
        pytest.exit(
            f"set {VARIABLE} to the coordinator of a Citus cluster, as a role that may create "
            "schemas: postgresql://postgres@localhost:5432/postgres",
            returncode=1,
        )
    return given


@pytest.fixture(scope="session", params=LAYOUTS, ids=str)
def tables(request: pytest.FixtureRequest, address: str) -> Iterator[Tables]:
    """A schema with all tables, made by the command and then laid out."""
    tables = Tables(address, request.param)
    is_distributed = "on" if tables.layout.kind == "schema" else "off"
    asyncio.run(
        tables.execute(
            f"SET citus.enable_schema_based_sharding = {is_distributed}; "
            f"CREATE SCHEMA {tables.schema}"
        )
    )
    made = run_taskiq_sa_pg("upgrade", "--queue", env=tables.environment)
    assert made.exit_code == 0, made.output
    asyncio.run(tables.execute("ALTER TABLE taskiq_results ADD COLUMN customer VARCHAR"))
    if tables.layout.kind == "task_id":
        asyncio.run(tables.execute(DISTRIBUTE))
    yield tables
    asyncio.run(tables.execute(f"DROP SCHEMA {tables.schema} CASCADE"))


@pytest.fixture(scope="session")
def models(tables: Tables) -> Models:
    return models_of(tables.config)


@pytest.fixture(params=["asyncpg", "psycopg"])
async def place(
    request: pytest.FixtureRequest, tables: Tables, models: Models
) -> AsyncIterator[Place]:
    """The tables through each driver; at the end nothing holds a connection."""
    async with AsyncExitStack() as stack:
        yield Place(tables, models, request.param, stack)
