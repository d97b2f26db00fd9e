"""What a broker is told of the tables that it finds."""

import asyncio
import shlex
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    QueueMixin,
    ResultMixin,
    SchemaError,
    TableConfig,
    build_models,
)
from taskiq_sa_pg.schema import QUEUE, check_queue
from taskiq_sa_pg.schema.migrate import provision
from tests.commands import run_taskiq_sa_pg
from tests.conftest import Database
from tests.migrations.applications import execute_script
from tests.migrations.conftest import alembic, opened, with_password

NAME = "taskiq_results"

MODELS = build_models(queue=True)


async def make(database: Database, config: TableConfig = MODELS.config) -> None:
    async with opened(database.dsn) as ours:
        await provision(ours, config, family=QUEUE)


async def check(dsn: str, models: Models = MODELS, **options: Any) -> None:
    async with opened(dsn) as ours:
        await check_queue(ours, models, **options)


async def refusal(dsn: str, models: Models = MODELS, **options: Any) -> str:
    with pytest.raises(SchemaError) as caught:
        await check(dsn, models, **options)
    return str(caught.value)


async def test_absent_tables_are_named_with_what_makes_them(database: Database) -> None:
    assert await refusal(database.dsn) == (
        f"table {NAME}_queue and the other tables of the broker do not exist; create them with "
        "`alembic -x queue=true upgrade head`, `taskiq-sa-pg upgrade --queue` or "
        "run_migrations=True"
    )


@pytest.mark.parametrize("position", [1, 3], ids=["alembic", "taskiq-sa-pg"])
async def test_the_command_that_is_printed_makes_the_tables(
    database: Database, other_database: Database, position: int
) -> None:
    models = build_models(
        'it\'s "odd" $(100%)', field_for_task_id="Uuid", schema=other_database.schema, queue=True
    )
    message = await refusal(database.dsn, models)
    program, *arguments = shlex.split(message.split("`")[position])
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    if program == "alembic":
        await alembic(*arguments, **dsn)
    else:
        assert program == "taskiq-sa-pg"
        outcome = await asyncio.to_thread(run_taskiq_sa_pg, *arguments, env=dsn)
        assert outcome.exit_code == 0, outcome.output
    await check(database.dsn, models)


def columns_of(table: sa.Table | None) -> list[str]:
    assert table is not None
    return table.c.keys()


QUEUE_COLUMNS = columns_of(MODELS.queue_table)
SCHEDULE_COLUMNS = columns_of(MODELS.schedules_table)

# Statements, and all that is then wrong.
DIFFERENCES: dict[str, tuple[list[str], list[str]]] = {
    "queue": (["DROP TABLE {0}_queue"], ["table {0}_queue does not exist"]),
    "schedules": (["DROP TABLE {0}_schedules"], ["table {0}_schedules does not exist"]),
    "columns": (
        [
            "ALTER TABLE {0}_queue ADD kept text",
            "ALTER TABLE {0}_schedules ADD kept text",
            *(f"ALTER TABLE {{0}}_queue DROP {name}" for name in QUEUE_COLUMNS),
            *(f"ALTER TABLE {{0}}_schedules DROP {name}" for name in SCHEDULE_COLUMNS),
        ],
        [
            *(f"column {{0}}_queue.{name} is missing" for name in QUEUE_COLUMNS),
            *(f"column {{0}}_schedules.{name} is missing" for name in SCHEDULE_COLUMNS),
        ],
    ),
    "types": (
        [
            "ALTER TABLE {0}_queue ALTER task_id TYPE uuid USING NULL::uuid",
            "ALTER TABLE {0}_queue ALTER priority TYPE int",
            "ALTER TABLE {0}_queue ALTER message TYPE text USING NULL::text",
            "ALTER TABLE {0}_schedules ALTER interval TYPE text",
            "ALTER TABLE {0}_schedules ALTER time TYPE timestamp",
        ],
        [
            "column {0}_queue.task_id is uuid and must be character varying",
            "column {0}_queue.priority is integer and must be smallint",
            "column {0}_queue.message is text and must be bytea",
            "column {0}_schedules.interval is text and must be interval",
            "column {0}_schedules.time is timestamp without time zone and must be timestamp with "
            "time zone",
        ],
    ),
    "constraints": (
        [
            "ALTER TABLE {0}_queue DROP CONSTRAINT {0}_queue_pkey",
            "ALTER TABLE {0}_schedules DROP CONSTRAINT {0}_schedules_pkey",
            "ALTER TABLE {0}_queue ALTER worker SET NOT NULL",
            "ALTER TABLE {0}_schedules ALTER cron SET NOT NULL",
        ],
        [
            "column {0}_queue.worker is NOT NULL without a default, and the broker may leave it "
            "empty",
            "column {0}_queue.task_id is neither primary key nor unique",
            "column {0}_schedules.cron is NOT NULL without a default, and the broker may leave it "
            "empty",
            "column {0}_schedules.schedule_id is neither primary key nor unique",
        ],
    ),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
async def test_each_difference_is_named_with_what_mends_it(database: Database, kind: str) -> None:
    changes, differences = DIFFERENCES[kind]
    await make(database)
    await execute_script(database, "; ".join(changes).format(NAME))
    message = await refusal(database.dsn)
    told = "; ".join(differences).format(NAME)
    assert message.startswith(f"the broker cannot use its tables: {told}. Create or upgrade ")
    assert "`alembic -x queue=true upgrade head`" in message
    assert "`taskiq-sa-pg upgrade --queue`" in message
    assert "(`taskiq-sa-pg current --queue-only`)" in message
    assert "`taskiq-sa-pg sql --queue-only` prints" in message


async def test_what_an_upgrade_cannot_mend_is_told_with_what_can(database: Database) -> None:
    await make(database)
    await database.fetch(f"ALTER TABLE {NAME}_queue DROP claim")
    message = await refusal(database.dsn, is_provisioned=True)
    assert f"column {NAME}_queue.claim is missing. They have the latest version" in message
    assert "`taskiq-sa-pg sql --queue-only` prints their definition" in message
    assert "run_migrations" not in message


async def test_a_difference_that_does_no_harm_is_none(database: Database) -> None:
    await make(database)
    changes = (
        "ALTER TABLE {0}_queue ADD tenant text",
        "ALTER TABLE {0}_schedules ADD tenant text NOT NULL DEFAULT 'none'",
        "ALTER TABLE {0}_queue ALTER queue_name DROP DEFAULT",
        "DROP INDEX {0}_queue_available_at_idx",
    )
    await execute_script(database, "; ".join(changes).format(NAME))
    await check(database.dsn)


async def test_schedules_count_only_where_there_is_a_model(database: Database) -> None:
    await make(database)
    await database.fetch(f"DROP TABLE {NAME}_schedules")
    await check(database.dsn, replace(MODELS, Schedule=None))


async def test_the_tables_of_results_do_not_count(database: Database) -> None:
    """Nor do the broker's for a backend: test_startup_check.py has none."""
    await make(database)
    await check(database.dsn)
    await database.fetch(f"CREATE TABLE {NAME} (kept text)")
    await check(database.dsn)


async def test_the_check_is_one_query_of_the_catalogue(database: Database) -> None:
    await make(database)
    statements: list[str] = []
    async with opened(database.dsn) as ours:

        @sa.event.listens_for(ours.engine.sync_engine, "before_cursor_execute")
        def record(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        await check_queue(ours, MODELS)
    assert len(statements) == 1
    assert "pg_catalog.pg_attribute" in statements[0]


async def test_a_role_without_rights_is_told_what_to_grant(database: Database, role: str) -> None:
    await make(database)
    dsn = with_password(database.dsn, username=role)
    message = await refusal(dsn)
    places = f"{database.schema}.{NAME}_queue, {database.schema}.{NAME}_schedules"
    grant = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {places} TO {role}"
    assert f"role {role} lacks privileges that the broker needs on table {NAME}_queue" in message
    assert message.split("`")[1] == grant
    await database.fetch(grant)
    await check(dsn)
    await database.fetch(f"REVOKE INSERT, DELETE ON {NAME}_queue FROM {role}")
    message = await refusal(dsn)
    assert f"`GRANT INSERT, DELETE ON {database.schema}.{NAME}_queue TO {role}`" in message
    assert "only reads results" not in message


async def test_a_role_that_may_not_see_the_schema_is_told_what_to_grant(
    database: Database, role: str
) -> None:
    await make(database)
    await database.fetch(f"GRANT ALL ON ALL TABLES IN SCHEMA {database.schema} TO {role}")
    await database.fetch(f"REVOKE USAGE ON SCHEMA {database.schema} FROM {role}")
    dsn = with_password(database.dsn, username=role)
    assert f"`GRANT USAGE ON SCHEMA {database.schema} TO {role}`" in await refusal(dsn)


async def test_a_role_that_may_not_create_tables_is_told_what_to_grant(
    database: Database, role: str
) -> None:
    async with opened(with_password(database.dsn, username=role)) as ours:
        with pytest.raises(SchemaError, match=f"migrate table {NAME}_queue") as caught:
            await provision(ours, MODELS.config, family=QUEUE)
    assert "GRANT USAGE, CREATE ON SCHEMA" in str(caught.value)


async def test_columns_of_your_own_are_compared(database: Database) -> None:
    class Base(DeclarativeBase):
        pass

    class Result(ResultMixin, Base):
        pass

    class Progress(ProgressMixin, Base):
        pass

    class Queue(QueueMixin, Base):
        tenant: Mapped[str] = mapped_column()

    await make(database)
    models = Models(Result, Progress, Queue=Queue)
    message = await refusal(database.dsn, models)
    assert message.startswith(f"the broker cannot use its tables: column {NAME}_queue.tenant is ")
    assert message.endswith("missing (your model adds it: create it in your own migration)")
    await database.fetch(f"ALTER TABLE {NAME}_queue ADD tenant text NOT NULL")
    message = await refusal(database.dsn, models)
    assert f"column {NAME}_queue.tenant is NOT NULL without a default" in message
    assert message.endswith("(add a server_default)")
    await database.fetch(f"ALTER TABLE {NAME}_queue ALTER tenant SET DEFAULT 'none'")
    await check(database.dsn, models)
