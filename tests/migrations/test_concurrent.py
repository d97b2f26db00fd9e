"""Any number of processes and backends may bring the tables up to date at the same time."""

import asyncio

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.steps import LATEST_VERSION
from tests.conftest import BackendFactory, Database
from tests.migrations.conftest import alembic, tables


async def versions(database: Database, table_name: str = "taskiq_results") -> list[str]:
    rows = await database.fetch(f'SELECT version_num FROM "{table_name}_version"')
    return [row["version_num"] for row in rows]


async def test_twenty_processes_upgrade_at_once(database: Database) -> None:
    commands = [alembic("upgrade", "head", TASKIQ_SA_PG_DSN=database.dsn) for _ in range(20)]
    outcomes = await asyncio.gather(*commands)
    assert [outcome.stderr for outcome in outcomes if outcome.status != 0] == []
    steps_taken = sum(outcome.stderr.count("Running upgrade") for outcome in outcomes)
    assert steps_taken == LATEST_VERSION
    assert await versions(database) == ["0003"]


async def test_twenty_backends_for_two_tables_migrate_at_once_in_one_event_loop(
    database: Database, start_backend: BackendFactory
) -> None:
    backends = await asyncio.gather(
        *(
            start_backend(table_name=f"table {number % 2}", run_migrations=True)
            for number in range(20)
        )
    )
    suffixes = ("", "_progress", "_status", "_version")
    made = [f"table {number}{suffix}" for number in (0, 1) for suffix in suffixes]
    assert await tables(database) == made
    assert await versions(database, "table 0") == await versions(database, "table 1") == ["0003"]
    assert [await backend.is_result_ready("1") for backend in backends] == [False] * 20


async def test_processes_that_name_the_default_schema_and_ones_that_do_not_wait_for_each_other(
    database: Database, start_backend: BackendFactory
) -> None:
    schemas = [None, database.schema] * 5
    await asyncio.gather(*(start_backend(schema=schema) for schema in schemas))
    assert await versions(database) == ["0003"]


async def test_backend_and_command_record_the_same_version(
    database: Database, start_backend: BackendFactory
) -> None:
    await start_backend(run_migrations=True)
    upgrade = await alembic("upgrade", "head", TASKIQ_SA_PG_DSN=database.dsn)
    assert upgrade.status == 0
    assert "Running upgrade" not in upgrade.stderr
    again: SQLAlchemyResultBackend[int] = await start_backend(run_migrations=True)
    assert not await again.is_result_ready("1")
    assert await versions(database) == ["0003"]
