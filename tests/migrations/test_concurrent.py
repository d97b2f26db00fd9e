"""Any number of processes and backends may bring the tables up to date at the same time."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg import SchemaError, SQLAlchemyResultBackend, TableConfig
from taskiq_sa_pg.schema import QUEUE, RESULTS
from taskiq_sa_pg.schema.migrate import provision
from taskiq_sa_pg.timings import Timings
from tests.conftest import BackendFactory, Database, eventually
from tests.migrations.conftest import Outcome, alembic, alembic_error, opened, run, tables
from tests.tasks import result_of

NAME = "taskiq_results"


async def versions(database: Database, table_name: str = NAME) -> list[str]:
    rows = await database.fetch(f'SELECT version_num FROM "{table_name}_version"')
    return [row["version_num"] for row in rows]


@asynccontextmanager
async def locked(database: Database, table: str) -> AsyncIterator[None]:
    """Meanwhile nobody else writes into the table."""
    connection = await asyncpg.connect(database.dsn)
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {table} IN SHARE MODE")
            yield
    finally:
        await connection.close()


async def is_waited_for(database: Database, table: str) -> bool:
    query = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass"
    return await database.fetch(query, f"{database.schema}.{table}") != []


async def test_processes_and_backends_make_the_tables_by_turns(
    database: Database, start_backend: BackendFactory
) -> None:
    """Whoever is first holds a lock, for which all others wait; the broker's tables go along."""
    await alembic("stamp", "base", TASKIQ_SA_PG_DSN=database.dsn)
    application = f"upgrading {database.schema}"
    dsn = f"{database.dsn}&application_name={application.replace(' ', '%20')}"
    commands = [(sys.executable, "-m", "alembic"), ("taskiq-sa-pg",)]

    async def upgrade(*command: str) -> Outcome:
        both = {"TASKIQ_SA_PG_DSN": dsn, "TASKIQ_SA_PG_QUEUE": "true"}
        return await run(*command, "upgrade", "head", **both)

    async def all_wait() -> bool:
        query = "SELECT 1 FROM pg_stat_activity WHERE application_name = $1 AND wait_event = $2"
        return len(await database.fetch(query, application, "advisory")) == len(commands) + 2

    async with asyncio.TaskGroup() as group, locked(database, f"{NAME}_version"):
        group.create_task(start_backend(timings=Timings(lock=60)))
        await eventually(lambda: is_waited_for(database, f"{NAME}_version"))
        # However long: the limit is for the locks of a step alone.
        given = {"timings": Timings(lock=0.001), "startup_timeout": 0}
        starting = [group.create_task(start_backend(dsn=dsn, **given)) for _ in range(2)]
        upgrading = [group.create_task(upgrade(*command)) for command in commands]
        await eventually(all_wait, 30, pause=0.1)
    outcomes = [task.result() for task in upgrading]
    assert [outcome.stderr for outcome in outcomes if outcome.status != 0] == []
    # At most one: that of the broker's tables, where Alembic is first.
    assert "".join(outcome.stderr for outcome in outcomes).count("Running upgrade") <= 1
    assert await versions(database) == await versions(database, f"{NAME}_queue") == ["0001"]
    assert [await task.result().is_result_ready("1") for task in starting] == [False, False]


async def test_backends_for_two_tables_migrate_at_once_in_one_event_loop(
    database: Database, start_backend: BackendFactory
) -> None:
    backends = await asyncio.gather(
        *(start_backend(table_name=f"table {number % 2}") for number in range(8))
    )
    suffixes = ("", "_progress", "_status", "_version", "_workers")
    made = [f"table {number}{suffix}" for number in (0, 1) for suffix in suffixes]
    assert await tables(database) == made
    assert await versions(database, "table 0") == await versions(database, "table 1") == ["0001"]
    assert [await backend.is_result_ready("1") for backend in backends] == [False] * 8


async def test_both_families_are_provisioned_at_once_in_one_event_loop(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """As a backend and a broker of one process do; by any number of processes."""
    async with opened(database.dsn) as one, opened(database.psycopg_dsn) as two:
        configs = TableConfig(), TableConfig(schema=database.schema)
        with caplog.at_level(logging.INFO, "taskiq_sa_pg"):
            await asyncio.gather(
                *(
                    provision(each, config, family=family)
                    for each in (one, two)
                    for config in configs
                    for family in (QUEUE, RESULTS)
                )
            )
    assert len(caplog.records) == 2
    assert await versions(database) == await versions(database, f"{NAME}_queue") == ["0001"]


async def test_processes_that_name_the_default_schema_and_ones_that_do_not_wait_for_each_other(
    database: Database, start_backend: BackendFactory
) -> None:
    schemas = [None, database.schema] * 2
    await asyncio.gather(*(start_backend(schema=schema) for schema in schemas))
    assert await versions(database) == ["0001"]


async def test_backend_and_command_record_the_same_version(
    database: Database, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    await start_backend()
    with caplog.at_level(logging.INFO, "alembic"):
        await alembic("upgrade", "head", TASKIQ_SA_PG_DSN=database.dsn)
    assert "Running upgrade" not in caplog.text
    again: SQLAlchemyResultBackend[int] = await start_backend()
    assert not await again.is_result_ready("1")
    assert await versions(database) == ["0001"]


async def test_a_step_gives_way_and_is_tried_again_for_as_long_as_startup_has(
    database: Database, start_backend: BackendFactory
) -> None:
    await alembic("stamp", "base", TASKIQ_SA_PG_DSN=database.dsn)
    timings = Timings(lock=0.05)
    async with locked(database, f"{NAME}_version"), asyncio.timeout(20):
        with pytest.raises(SchemaError, match=r"lock timeout.*pg_stat_activity"):
            await start_backend(timings=timings, startup_timeout=0)
        migrating = asyncio.create_task(start_backend(timings=timings))
        await eventually(lambda: is_waited_for(database, f"{NAME}_version"))
        assert not migrating.done()
    await (await migrating).set_result("1", result_of(1))


@asynccontextmanager
async def reading(backend: SQLAlchemyResultBackend[int]) -> AsyncIterator[None]:
    """Meanwhile a transaction is open that has read the results table."""
    release, is_held = asyncio.Event(), asyncio.Event()

    async def read(connection: AsyncConnection) -> None:
        await connection.execute(sa.select(backend.models.results_table.c.task_id))
        is_held.set()
        await release.wait()

    reader = asyncio.create_task(backend.runtime.database.transact(read, "read"))
    await is_held.wait()
    try:
        yield
    finally:
        release.set()
        await reader


async def test_a_command_gives_way_to_those_who_write_and_says_what_to_do(
    database: Database, start_backend: BackendFactory
) -> None:
    """They would have to wait behind it for the end of a transaction that only reads."""
    backend = await start_backend()
    async with reading(backend), asyncio.timeout(20):
        downgrade = alembic_error("downgrade", "base", TASKIQ_SA_PG_DSN=database.dsn)
        downgrading = asyncio.create_task(downgrade)
        await eventually(lambda: is_waited_for(database, NAME))
        for number in range(20):
            await backend.set_result(f"{number}", result_of(number))
        message = await downgrading
    assert "lock timeout" in message
    assert "pg_stat_activity" in message
    await alembic("downgrade", "base", TASKIQ_SA_PG_DSN=database.dsn)
    assert await tables(database) == [f"{NAME}_version"]
