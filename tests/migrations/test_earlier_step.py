"""This release on the tables of the one before, that one on ours, and the way from it to here."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection
from taskiq import InMemoryBroker, TaskiqResult

from taskiq_sa_pg import (
    SchemaError,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
)
from taskiq_sa_pg.rows import METADATA_COLUMNS
from tests.conftest import BackendFactory, Database, eventually
from tests.migrations.conftest import alembic, with_password
from tests.migrations.test_steps import downgrade, upgrade

NAME = "taskiq_results"

Backend = SQLAlchemyResultBackend[Any]


def result_of(value: Any, **fields: Any) -> TaskiqResult[Any]:
    return TaskiqResult(**{"is_err": False, "return_value": value, "execution_time": 1, **fields})


async def execute(backend: Backend, number: int = 1) -> list[str]:
    """The ids of tasks that have been executed at the same time."""
    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(record_args=True))

    @broker.task(task_name="double")
    async def double(value: int) -> int:
        return 2 * value

    tasks = [await double.kiq(value) for value in range(number)]
    await broker.wait_all()
    return [task.task_id for task in tasks]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("keep_results", [True, False])
async def test_this_release_works_on_the_tables_of_the_one_before(
    database: Database,
    start_backend: BackendFactory,
    caplog: pytest.LogCaptureFixture,
    driver: str,
    keep_results: bool,
) -> None:
    await upgrade(database.dsn, 1)
    with caplog.at_level(logging.INFO, "taskiq_sa_pg"):
        backend = await start_backend(
            database.dsn_of(driver), run_migrations=False, keep_results=keep_results
        )
    [record] = [r for r in caplog.records if r.name.startswith("taskiq_sa_pg")]
    assert record.levelname == "WARNING"
    assert "`alembic upgrade head`" in record.getMessage()
    for number in (1, 10):
        ids = await execute(backend, number)
        rows = await database.fetch(f"SELECT task_name FROM {NAME} WHERE task_id = ANY($1)", ids)
        assert [row["task_name"] for row in rows] == ["double"] * number
        results = await backend.get_results(ids)
        assert [results[i].return_value for i in ids] == [2 * value for value in range(number)]
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.WARNING] == []


async def test_the_columns_are_used_once_startup_has_found_them(
    database: Database, start_backend: BackendFactory
) -> None:
    await upgrade(database.dsn, 1)
    backend = await start_backend(run_migrations=False)
    [before] = await execute(backend)
    await upgrade(database.dsn, 2)
    [meanwhile] = await execute(backend)
    await backend.startup()
    [after] = await execute(backend)
    rows = await database.fetch(f"SELECT task_id, args, worker FROM {NAME}")
    found = {row["task_id"]: (row["args"], row["worker"] is not None) for row in rows}
    assert found == {before: (None, False), meanwhile: (None, False), after: ("[0]", True)}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("check_schema", ["off", "warn"])
async def test_no_result_is_lost_where_nobody_has_looked(
    database: Database,
    start_backend: BackendFactory,
    caplog: pytest.LogCaptureFixture,
    check_schema: str,
    driver: str,
) -> None:
    await upgrade(database.dsn, 1)
    # A difference beside it, so that "warn" does not find the step out.
    await database.fetch(f"ALTER TABLE {NAME} ALTER log TYPE varchar(9)")
    backend = await start_backend(
        database.dsn_of(driver), run_migrations=False, check_schema=check_schema
    )
    caplog.clear()
    for number in (10, 1):
        ids = await execute(backend, number)
        assert [(await backend.get_result(i)).return_value for i in ids] == [
            2 * value for value in range(number)
        ]
    [record] = [r for r in caplog.records if r.name.startswith("taskiq_sa_pg")]
    assert "lacks columns of step 2" in record.getMessage()


async def test_tables_may_be_downgraded_under_a_backend(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(run_migrations=True)
    await execute(backend)
    await downgrade(database.dsn, 2)
    ids = await execute(backend, 10)
    assert len(await backend.get_results(ids)) == 10


@pytest.mark.parametrize("missing", METADATA_COLUMNS)
async def test_a_part_of_the_columns_counts_as_none(
    database: Database, start_backend: BackendFactory, missing: str
) -> None:
    await start_backend(run_migrations=True)
    await database.fetch(f"ALTER TABLE {NAME} DROP COLUMN {missing}")
    backend = await start_backend(run_migrations=False)
    [task_id] = await execute(backend)
    assert (await backend.get_result(task_id)).return_value == 0


async def test_a_column_of_the_wrong_type_is_a_difference(
    database: Database, start_backend: BackendFactory
) -> None:
    await start_backend(run_migrations=True)
    await database.fetch(f"ALTER TABLE {NAME} ALTER worker TYPE varchar(9)")
    with pytest.raises(SchemaError, match=r"worker is character varying and should be text"):
        await start_backend(run_migrations=False)


async def test_what_the_release_before_writes_fits_our_tables(
    database: Database, start_backend: BackendFactory
) -> None:
    """Its INSERT names the columns of step 1."""
    backend = await start_backend(run_migrations=True)
    [described] = await execute(backend)
    await database.fetch(
        f"INSERT INTO {NAME} (task_id, is_err, return_value, error, error_type, traceback, "
        "execution_time, labels, log, task_name, attempt, expires_at) "
        f"SELECT 'old', is_err, return_value, error, error_type, traceback, execution_time, "
        f"labels, log, task_name, attempt, expires_at FROM {NAME}"
    )
    old = await backend.get_result("old")
    assert old.return_value == (await backend.get_result(described)).return_value


async def test_rows_survive_the_step_and_are_not_rewritten(
    database: Database, start_backend: BackendFactory
) -> None:
    await upgrade(database.dsn, 1)
    backend = await start_backend(run_migrations=False)
    await backend.set_result("1", result_of({"a": (1,)}))

    async def file() -> Any:
        [row] = await database.fetch(f"SELECT pg_relation_filenode('{NAME}') AS node")
        return row["node"]

    before = await file()
    await upgrade(database.dsn, 2)
    assert await file() == before
    again = await start_backend(run_migrations=False)
    assert (await again.get_result("1")).return_value == {"a": (1,)}
    await execute(again)
    await downgrade(database.dsn, 2)
    assert await file() == before
    once_more = await start_backend(run_migrations=False)
    assert (await once_more.get_result("1")).return_value == {"a": (1,)}


@asynccontextmanager
async def reading(backend: Backend) -> AsyncIterator[None]:
    """Meanwhile a transaction is open that has read the results table."""
    release, is_held = asyncio.Event(), asyncio.Event()

    async def read(connection: AsyncConnection) -> None:
        await connection.execute(sa.select(backend.models.results_table.c.task_id))
        is_held.set()
        await release.wait()

    reader = asyncio.create_task(backend._store.transact(read, "read"))
    await is_held.wait()
    try:
        yield
    finally:
        release.set()
        await reader


async def is_waited_for(database: Database) -> bool:
    query = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass"
    return await database.fetch(query, f"{database.schema}.{NAME}") != []


async def test_a_step_gives_way_to_a_transaction_and_is_tried_again(
    database: Database, start_backend: BackendFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes meanwhile does not wait for the reader behind the step."""
    monkeypatch.setattr("taskiq_sa_pg.provisioning._LOCK_TIMEOUT", "50ms")
    environment = {"TASKIQ_SA_PG_DSN": with_password(database.dsn)}
    assert (await alembic("upgrade", "0001", **environment)).status == 0
    backend = await start_backend(run_migrations=False)
    async with reading(backend):
        migrating = asyncio.create_task(start_backend(run_migrations=True))
        await eventually(lambda: is_waited_for(database))
        for number in range(20):
            async with asyncio.timeout(5):
                await backend.set_result(f"{number}", result_of(number))
        assert not migrating.done()
    [task_id] = await execute(await migrating)
    [row] = await database.fetch(f"SELECT args FROM {NAME} WHERE task_id = $1", task_id)
    assert row["args"] == "[0]"


async def test_a_command_that_gets_no_lock_says_what_to_do(
    database: Database, start_backend: BackendFactory
) -> None:
    environment = {"TASKIQ_SA_PG_DSN": with_password(database.dsn)}
    assert (await alembic("upgrade", "0001", **environment)).status == 0
    backend = await start_backend(run_migrations=False)
    async with reading(backend), asyncio.timeout(20):
        message = (await alembic("upgrade", "head", **environment)).message
    assert "lock timeout" in message
    assert "pg_stat_activity" in message
    assert (await alembic("upgrade", "head", **environment)).status == 0
