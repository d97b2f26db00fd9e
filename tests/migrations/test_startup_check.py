"""What startup() makes of the tables that it finds."""

import asyncio
import logging
import shlex
import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from taskiq import TaskiqResult

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultMixin,
    SchemaError,
    StorageError,
)
from taskiq_sa_pg.database import make_engine
from tests.commands import run_taskiq_sa_pg
from tests.conftest import BackendFactory, Database
from tests.integration.old_tables import fill_plainly, old_backend
from tests.migrations.conftest import alembic, catalogue, tables, with_password

NAME = "taskiq_results"

RESULT: TaskiqResult[Any] = TaskiqResult(is_err=False, return_value=7, execution_time=0.5)


async def refusal(start_backend: BackendFactory, **options: Any) -> str:
    with pytest.raises(SchemaError) as caught:
        await start_backend(**{"run_migrations": False, **options})
    return str(caught.value)


async def test_absent_tables_are_named_with_what_makes_them(start_backend: BackendFactory) -> None:
    assert await refusal(start_backend) == (
        "table taskiq_results and the other tables of the result backend do not exist; create "
        "them with `alembic upgrade head`, `taskiq-sa-pg upgrade` or run_migrations=True"
    )


@pytest.mark.parametrize("position", [1, 3], ids=["alembic", "taskiq-sa-pg"])
async def test_the_command_that_is_printed_makes_the_tables(
    database: Database, other_database: Database, start_backend: BackendFactory, position: int
) -> None:
    options = {
        "table_name": 'it\'s "odd" $(100%)',
        "schema": other_database.schema,
        "field_for_task_id": "Uuid",
        "field_for_payload": "Jsonb",
    }
    message = await refusal(start_backend, **options)
    program, *arguments = shlex.split(message.split("`")[position])
    if program == "alembic":
        await alembic(*arguments, TASKIQ_SA_PG_DSN=database.dsn)
    else:
        assert program == "taskiq-sa-pg"
        dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
        outcome = await asyncio.to_thread(run_taskiq_sa_pg, *arguments, env=dsn)
        assert outcome.exit_code == 0, outcome.output
    backend = await start_backend(**options, run_migrations=False)
    task_id = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    await backend.set_result(task_id, RESULT)
    assert (await backend.get_result(task_id)).return_value == 7


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("DROP TABLE {0}_progress", "table {0}_progress does not exist"),
        ("DROP TABLE {0}_status", "table {0}_status does not exist"),
        ("DROP TABLE {0}_workers", "table {0}_workers does not exist"),
        ("ALTER TABLE {0}_workers DROP COLUMN seen_at", "{0}_workers.seen_at is missing"),
        ("ALTER TABLE {0} DROP COLUMN log", "column {0}.log is missing"),
        ("ALTER TABLE {0} DROP COLUMN started_at", "column {0}.started_at is missing"),
        ("ALTER TABLE {0}_progress DROP COLUMN updated_at", "{0}_progress.updated_at is missing"),
        ("ALTER TABLE {0}_status DROP COLUMN worker", "column {0}_status.worker is missing"),
        (
            "ALTER TABLE {0} ALTER error TYPE text",
            "column {0}.error is text and must be bytea",
        ),
        (
            "ALTER TABLE {0} ALTER worker TYPE varchar(9)",
            "column {0}.worker is character varying and must be text",
        ),
        (
            "ALTER TABLE {0} ALTER expires_at TYPE timestamp",
            "is timestamp without time zone and must be timestamp with time zone",
        ),
        (
            "ALTER TABLE {0} DROP CONSTRAINT {0}_pkey",
            "column {0}.task_id is neither primary key nor unique",
        ),
        (
            "ALTER TABLE {0} DROP CONSTRAINT {0}_pkey, ADD UNIQUE (task_id) DEFERRABLE",
            "column {0}.task_id is neither primary key nor unique",
        ),
        ("ALTER TABLE {0} ALTER error SET NOT NULL", "column {0}.error is NOT NULL without"),
        ("ALTER TABLE {0} ALTER finished_at DROP DEFAULT", "column {0}.finished_at is NOT NULL"),
    ],
)
async def test_a_difference_is_named_with_what_mends_it(
    database: Database, start_backend: BackendFactory, change: str, difference: str
) -> None:
    await start_backend(run_migrations=True)
    await database.fetch(change.format(NAME))
    message = await refusal(start_backend)
    assert difference.format(NAME) in message
    assert message.count(";") == 1
    assert "`alembic upgrade head`" in message
    assert "`taskiq-sa-pg sql`" in message


async def test_what_an_upgrade_cannot_mend_is_told_with_what_can(
    database: Database, start_backend: BackendFactory
) -> None:
    await start_backend(run_migrations=True)
    await database.fetch(f"ALTER TABLE {NAME} DROP COLUMN log")
    message = await refusal(start_backend, run_migrations=True)
    assert f"column {NAME}.log is missing. They have the latest version" in message
    assert "`taskiq-sa-pg sql` prints their definition" in message
    assert "run_migrations" not in message
    assert "upgrade" not in message


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE {0} ADD tenant text",
        "ALTER TABLE {0} ADD tenant text NOT NULL DEFAULT 'none'",
        "ALTER TABLE {0} ADD number bigint GENERATED ALWAYS AS IDENTITY",
        "ALTER TABLE {0} ADD size int GENERATED ALWAYS AS (length(task_id)) STORED",
        "ALTER TABLE {0} DROP CONSTRAINT {0}_pkey; CREATE UNIQUE INDEX ON {0} (task_id)",
        "ALTER TABLE {0} ALTER task_id TYPE varchar(99)",
        "DROP INDEX {0}_finished_at_idx",
    ],
    ids=["null", "default", "identity", "generated", "unique", "length", "index"],
)
async def test_a_difference_that_does_no_harm_is_none(
    database: Database, start_backend: BackendFactory, change: str
) -> None:
    await start_backend(run_migrations=True)
    for statement in change.format(NAME).split(";"):
        await database.fetch(statement)
    backend = await start_backend(run_migrations=False)
    await backend.set_result("1", RESULT)
    assert (await backend.get_result("1")).return_value == 7


async def test_a_foreign_table_of_the_same_name_is_refused_and_left_untouched(
    database: Database, start_backend: BackendFactory
) -> None:
    """By startup() with and without run_migrations."""
    await database.fetch(f"CREATE TABLE {NAME} (task_id VARCHAR UNIQUE, kept TEXT)")
    await database.fetch(f"INSERT INTO {NAME} VALUES ('1', 'result')")
    before = await catalogue(database)
    for run_migrations in (False, True):
        message = await refusal(start_backend, run_migrations=run_migrations)
        assert "choose another table_name" in message
    assert f'"{NAME}" already exists' in message
    assert await catalogue(database) == before
    assert await tables(database) == [NAME]
    assert len(await database.fetch(f"SELECT * FROM {NAME}")) == 1


async def test_warn_logs_the_difference_and_starts(
    start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "taskiq_sa_pg"):
        backend = await start_backend(run_migrations=False, check_schema="warn")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "do not exist" in caplog.text
    with pytest.raises(StorageError, match="alembic upgrade head"):
        await backend.is_result_ready("1")


async def test_off_asks_nothing_and_starts(
    database: Database, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    engine, statements = recording_engine(database)
    await start_backend(engine=engine, run_migrations=False, check_schema="off")
    await engine.dispose()
    assert statements == []
    assert caplog.records == []


async def test_the_check_is_one_query_of_the_catalogue(
    database: Database, start_backend: BackendFactory
) -> None:
    await start_backend(run_migrations=True)
    engine, statements = recording_engine(database)
    await start_backend(engine=engine, run_migrations=False)
    await engine.dispose()
    assert len(statements) == 1
    assert "pg_catalog.pg_attribute" in statements[0]


def recording_engine(database: Database) -> tuple[AsyncEngine, list[str]]:
    engine = make_engine(database.dsn)
    statements: list[str] = []

    @sa.event.listens_for(engine.sync_engine, "before_cursor_execute")
    def record(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    return engine, statements


async def test_tables_in_another_schema_than_the_one_named_do_not_count(
    database: Database, other_database: Database, start_backend: BackendFactory
) -> None:
    await start_backend(run_migrations=True)
    message = await refusal(start_backend, schema=other_database.schema)
    assert f"table {other_database.schema}.{NAME} and " in message
    assert f"`alembic -x schema={other_database.schema} upgrade head`" in message


async def test_a_role_that_may_only_read_and_write_rows_starts_stores_and_reads(
    database: Database, start_backend: BackendFactory, role: str
) -> None:
    await start_backend(run_migrations=True)
    dsn = with_password(database.dsn, username=role)
    grant = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {await names_of(database)} TO {role}"
    message = await refusal(start_backend, dsn=dsn)
    assert message.split("`")[1] == grant
    assert "check_schema" not in message
    await database.fetch(grant)
    backend = await start_backend(dsn, keep_results=False, run_migrations=False)
    for _ in range(2):
        await backend.set_result("1", RESULT)
    assert (await backend.get_result("1")).return_value == 7
    assert not await backend.is_result_ready("1")


async def names_of(database: Database) -> str:
    names = (NAME, f"{NAME}_progress", f"{NAME}_status", f"{NAME}_workers")
    return ", ".join(f"{database.schema}.{name}" for name in names)


async def test_the_grant_that_is_printed_can_be_carried_out(
    database: Database, start_backend: BackendFactory, role: str
) -> None:
    options = {"table_name": 'it\'s "odd" $(100%)', "run_migrations": False}
    await start_backend(**{**options, "run_migrations": True})
    dsn = with_password(database.dsn, username=role)
    message = await refusal(start_backend, dsn=dsn, **options)
    await database.fetch(message.split("`")[1])
    await start_backend(dsn, **options)


async def test_a_role_that_may_only_read_is_told_how_to_start_and_starts(
    database: Database,
    start_backend: BackendFactory,
    role: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    writer = await start_backend(run_migrations=True)
    await writer.set_result("1", RESULT)
    await database.fetch(f"GRANT SELECT ON ALL TABLES IN SCHEMA {database.schema} TO {role}")
    dsn = with_password(database.dsn, username=role)
    message = await refusal(start_backend, dsn=dsn)
    assert f"GRANT INSERT, UPDATE, DELETE ON {await names_of(database)} TO {role}`" in message
    assert 'check_schema="warn"' in message
    reader = await start_backend(dsn, run_migrations=False, check_schema="warn")
    assert [record.getMessage() for record in caplog.records] == [message]
    assert (await reader.wait_result("1", timeout=10)).return_value == 7


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "searched"])
async def test_a_role_that_may_not_see_the_schema_is_told_what_to_grant(
    database: Database, start_backend: BackendFactory, role: str, is_named: bool
) -> None:
    await start_backend(run_migrations=True)
    names, schema = await names_of(database), database.schema
    await database.fetch(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {names} TO {role}")
    await database.fetch(f"REVOKE USAGE ON SCHEMA {schema} FROM {role}")
    dsn = with_password(database.dsn, username=role)
    message = await refusal(start_backend, dsn=dsn, schema=schema if is_named else None)
    grant = f"GRANT USAGE ON SCHEMA {schema} TO {role}"
    assert f"`{grant}`" in message
    await database.fetch(grant)
    await start_backend(dsn, run_migrations=False)


async def test_rights_on_every_column_are_enough(
    database: Database, start_backend: BackendFactory, role: str
) -> None:
    backend = await start_backend(run_migrations=True)
    for table in (backend.models.results_table, backend.models.progress_table):
        columns = ", ".join(table.c.keys())
        rights = ", ".join(f"{right} ({columns})" for right in ("SELECT", "INSERT", "UPDATE"))
        await database.fetch(f"GRANT {rights}, DELETE ON {table.name} TO {role}")
    await database.fetch(f"GRANT ALL ON {NAME}_status, {NAME}_workers TO {role}")
    reader = await start_backend(with_password(database.dsn, username=role), run_migrations=False)
    await reader.set_result("1", RESULT)
    assert (await reader.get_result("1")).return_value == 7


@pytest.mark.parametrize("run_migrations", [False, True])
async def test_a_table_of_taskiq_postgres_is_told_with_the_commands_that_switch(
    database: Database, start_backend: BackendFactory, run_migrations: bool
) -> None:
    async with old_backend(database.dsn, table_name=NAME) as old:
        await fill_plainly(old, 2)
    message = await refusal(start_backend, run_migrations=run_migrations)
    assert "it is a table of taskiq-postgres" in message
    assert 'table_name="results"' in message
    assert "stamp" not in message
    upgrade, copy = message.split("`")[1::2]
    for command in (upgrade, copy):
        program, *arguments = shlex.split(command)
        assert program == "taskiq-sa-pg"
        dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
        outcome = await asyncio.to_thread(run_taskiq_sa_pg, *arguments, env=dsn)
        assert outcome.exit_code == 0, outcome.output
    backend = await start_backend(table_name="results", run_migrations=False)
    assert (await backend.get_result("task-00001")).return_value == 1


@pytest.mark.parametrize(
    "dropped", [("", "_progress", "_status", "_workers"), ("_workers",)], ids=["all", "one"]
)
async def test_tables_that_were_dropped_are_made_again(
    database: Database,
    start_backend: BackendFactory,
    caplog: pytest.LogCaptureFixture,
    dropped: tuple[str, ...],
) -> None:
    backend = await start_backend(run_migrations=True)
    await backend.set_result("1", RESULT)
    before = await catalogue(database)
    names = ", ".join(f"{NAME}{suffix}" for suffix in dropped)
    await database.fetch(f"DROP TABLE {names}")
    again = await start_backend(run_migrations=True)
    assert await catalogue(database) == before
    assert await again.is_result_ready("1") == ("" not in dropped)
    assert [record.getMessage() for record in caplog.records] == [
        f"{NAME}_version records version 0001, but tables were missing and were "
        f"created again, empty: {names}"
    ]


async def test_the_log_has_one_line_of_tables_that_are_made_and_none_of_others(
    start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await start_backend(run_migrations=True)
        await start_backend(run_migrations=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"table {NAME}: upgraded to version 0001"
    ]


def test_alembic_says_nothing_where_it_is_imported_by_startup(database: Database) -> None:
    code = (
        "import asyncio, logging, sys\n"
        "from taskiq_sa_pg import SQLAlchemyResultBackend\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "backend = SQLAlchemyResultBackend(sys.argv[1], run_migrations=True)\n"
        "async def main():\n"
        "    await backend.startup()\n"
        "    await backend.shutdown()\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, database.dsn]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert outcome.stderr == f"table {NAME}: upgraded to version 0001\n"


async def test_a_role_that_may_not_create_tables_is_told_what_to_grant(
    database: Database, start_backend: BackendFactory, role: str
) -> None:
    dsn = with_password(database.dsn, username=role)
    message = await refusal(start_backend, dsn=dsn, run_migrations=True)
    assert "permission denied for schema" in message
    assert "GRANT USAGE, CREATE ON SCHEMA" in message
    await database.fetch(f"GRANT USAGE, CREATE ON SCHEMA {database.schema} TO {role}")
    await start_backend(dsn=dsn, run_migrations=True)


async def test_a_role_that_may_only_read_and_write_rows_can_migrate_where_nothing_is_left_to_do(
    database: Database, start_backend: BackendFactory, role: str
) -> None:
    await start_backend(run_migrations=True)
    await database.fetch(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {database.schema} TO {role}"
    )
    dsn = with_password(database.dsn, username=role)
    await start_backend(dsn=dsn, run_migrations=True)


def own_models(tenant_default: str | None) -> Models:
    class Base(DeclarativeBase):
        pass

    class OwnResult(ResultMixin, Base):
        tenant: Mapped[str] = mapped_column(default=tenant_default)

    class OwnProgress(ProgressMixin, Base):
        pass

    return Models(OwnResult, OwnProgress)


async def create(database: Database, models: Models) -> None:
    engine = make_engine(database.dsn)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    await engine.dispose()


async def test_a_column_of_your_own_is_filled_by_the_models_default(
    database: Database, start_backend: BackendFactory
) -> None:
    models = own_models(tenant_default="all")
    await create(database, models)
    backend = await start_backend(models=models, run_migrations=False)
    await backend.set_result("1", RESULT)
    rows = await database.fetch(f"SELECT tenant FROM {NAME}")
    assert [row["tenant"] for row in rows] == ["all"]


async def test_a_column_of_your_own_that_nothing_fills_is_refused(
    database: Database, start_backend: BackendFactory
) -> None:
    models = own_models(tenant_default=None)
    await create(database, models)
    message = await refusal(start_backend, models=models)
    assert f"column {NAME}.tenant is NOT NULL without a default" in message
    assert message.endswith("in the results table, fill it with extra_values)")
    await database.fetch(f"ALTER TABLE {NAME} DROP COLUMN tenant")
    message = await refusal(start_backend, models=models)
    assert f"column {NAME}.tenant is missing" in message
    assert message.endswith("(your model adds it: create it in your own migration)")
