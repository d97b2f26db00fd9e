"""The shop's own Alembic history."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from examples.fastapi_app.conftest import alembic, empty_database, execute

CLEAN = "No new upgrade operations detected."
TABLES = {
    "0001": {"alembic_version", "orders"},
    "0002": {
        "alembic_version",
        "orders",
        "taskiq_results",
        "taskiq_results_progress",
        "taskiq_results_queue",
        "taskiq_results_schedules",
        "taskiq_results_status",
        "taskiq_results_workers",
    },
}


@pytest.fixture
async def database(server_dsn: str) -> AsyncIterator[str]:
    async with empty_database(server_dsn) as dsn:
        yield dsn


async def tables(dsn: str) -> set[str]:
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {row["tablename"] for row in rows}
    finally:
        await connection.close()


async def test_the_history_makes_what_the_models_describe_and_takes_it_back(database: str) -> None:
    await alembic(database, "upgrade", "0001")
    assert await tables(database) == TABLES["0001"]
    await alembic(database, "upgrade", "head")
    assert await tables(database) == TABLES["0002"]
    assert CLEAN in await alembic(database, "check")
    await alembic(database, "downgrade", "-1")
    assert await tables(database) == TABLES["0001"]
    await alembic(database, "downgrade", "base")
    assert await tables(database) == {"alembic_version"}


async def test_the_printed_sql_makes_the_same_tables(database: str) -> None:
    await execute(database, await alembic(database, "upgrade", "head", "--sql"))
    assert await tables(database) == TABLES["0002"]
    assert CLEAN in await alembic(database, "check")
