"""The steps of the broker's tables build what the models describe."""

from typing import Any, get_args

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from taskiq_sa_pg import ConfigurationError, TableConfig, schema
from taskiq_sa_pg.models import TaskIdField
from taskiq_sa_pg.schema import LATEST_VERSION, QUEUE, RESULTS, Family
from tests.conftest import Database
from tests.migrations.conftest import catalogue, tables
from tests.migrations.test_steps import NAMES, on_connection, operations, upgrade_to_latest

NAME = "taskiq_results"


async def upgrade(dsn: str, version: int = 1, **options: Any) -> None:
    await on_connection(dsn, lambda c: schema.upgrade_queue(operations(c), version, **options))


async def downgrade(dsn: str, version: int = 1, **options: Any) -> None:
    await on_connection(dsn, lambda c: schema.downgrade_queue(operations(c), version, **options))


async def differences(dsn: str, **options: Any) -> Any:
    """What autogenerate would change."""
    metadata = QUEUE.metadata(TableConfig(**options))

    def compare(connection: sa.Connection) -> Any:
        opts = {"compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=opts), metadata)

    return await on_connection(dsn, compare)


@pytest.mark.parametrize("field", get_args(TaskIdField))
async def test_the_step_builds_what_the_models_describe(
    database: Database, other_database: Database, field: TaskIdField
) -> None:
    """By both drivers; and autogenerate finds nothing to do after it."""
    name = NAMES[get_args(TaskIdField).index(field)]
    options = {"table_name": name, "field_for_task_id": field}
    dsns = (database.dsn, other_database.dsn)
    if field == "Text":
        dsns = (database.psycopg_dsn, other_database.psycopg_dsn)
    await upgrade(dsns[0], **options)
    built = await catalogue(database, name, QUEUE)
    assert await tables(database) == sorted(TableConfig(name).queue_table_names)
    await on_connection(dsns[1], QUEUE.metadata(TableConfig(**options)).create_all)
    assert built == await catalogue(other_database, name, QUEUE)
    assert await differences(database.dsn, **options) == []
    await downgrade(dsns[0], **options)
    assert await tables(database) == []


async def test_the_catalogue_of_these_tests_sees_what_matters(database: Database) -> None:
    """A comparison that saw nothing would always hold."""
    await upgrade(database.dsn)
    found = await catalogue(database, NAME, QUEUE)
    options = {row[0]: row[1] for row in found if row[-1] == "heap"}
    assert options[f"{NAME}_schedules"] == ["fillfactor=50"]
    assert "autovacuum_vacuum_threshold=1000" in options[f"{NAME}_queue"]
    assert "autovacuum_vacuum_scale_factor=0" in options[f"{NAME}_queue"]
    assert (f"{NAME}_queue", "queue_name", "text", True, "'default'::text") in found
    assert (f"{NAME}_queue", "priority", "smallint", True, "0") in found
    assert (f"{NAME}_schedules", "interval", "interval", False, None) in found
    assert (f"{NAME}_schedules", f"{NAME}_schedules_pkey", "PRIMARY KEY (schedule_id)") in found
    indexes = [row[1] for row in found if str(row[1]).startswith("CREATE INDEX")]
    assert indexes == [
        f"CREATE INDEX {NAME}_queue_available_at_idx ON {NAME}_queue USING btree "
        "(queue_name, priority DESC, available_at)"
    ]


async def test_a_schema_is_where_the_tables_go(
    database: Database, other_database: Database
) -> None:
    options = {"table_name": NAMES[1], "schema": other_database.schema}
    await upgrade(database.dsn, **options)
    assert await tables(database) == []
    assert await tables(other_database) == [f"{NAMES[1]}_queue", f"{NAMES[1]}_schedules"]
    await downgrade(database.dsn, **options)
    assert await tables(other_database) == []


async def test_neither_familys_step_touches_the_others_tables(database: Database) -> None:
    await upgrade_to_latest(database.dsn)
    results = await tables(database)
    await upgrade(database.dsn)
    await downgrade(database.dsn)
    assert await tables(database) == results == sorted(TableConfig(NAME).table_names)


@pytest.mark.parametrize("version", [0, LATEST_VERSION + 1, None])
async def test_a_version_that_does_not_exist_is_refused(database: Database, version: Any) -> None:
    for move in (upgrade, downgrade):
        with pytest.raises(ConfigurationError, match="there is no version"):
            await move(database.dsn, version)


@pytest.mark.parametrize("family", [RESULTS, QUEUE], ids=lambda family: family.user)
def test_each_family_has_a_step_for_each_version(family: Family) -> None:
    """The revisions are common to all."""
    assert list(family.steps) == list(range(1, LATEST_VERSION + 1))
