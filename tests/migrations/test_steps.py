"""The versioned steps build exactly what the models describe, up and down one at a time."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.operations import Operations, ops
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from taskiq_sa_pg import ConfigurationError, build_models, schema
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.models import PayloadField, TaskIdField
from taskiq_sa_pg.schema import LATEST_VERSION
from taskiq_sa_pg.schema.migrate import script_location
from tests.conftest import Database
from tests.migrations.conftest import LONG_NAME, catalogue, tables

NAMES = ["taskiq_results", 'Wéird "Re-sults" 100%(:x) user', LONG_NAME]

TYPES = [
    {"field_for_task_id": task_id, "field_for_payload": payload}
    for task_id in get_args(TaskIdField)
    for payload in get_args(PayloadField)
]


async def on_connection(dsn: str, work: Callable[[sa.Connection], Any]) -> Any:
    engine = make_engine(dsn)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


def operations(connection: sa.Connection, **opts: Any) -> Operations:
    return Operations(MigrationContext.configure(connection, opts=opts))


async def upgrade(dsn: str, version: int, **options: Any) -> None:
    await on_connection(dsn, lambda c: schema.upgrade(operations(c), version, **options))


async def downgrade(dsn: str, version: int, **options: Any) -> None:
    await on_connection(dsn, lambda c: schema.downgrade(operations(c), version, **options))


async def upgrade_to_latest(dsn: str, **options: Any) -> None:
    for version in range(1, LATEST_VERSION + 1):
        await upgrade(dsn, version, **options)


async def create_all(dsn: str, **options: Any) -> None:
    await on_connection(dsn, build_models(**options).metadata.create_all)


async def differences(dsn: str, **options: Any) -> Any:
    """What autogenerate would change."""
    metadata = build_models(metadata=sa.MetaData(), **options).metadata

    def compare(connection: sa.Connection) -> Any:
        opts = {"compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=opts), metadata)

    return await on_connection(dsn, compare)


@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(types.values()))
async def test_the_steps_build_what_the_models_describe(
    database: Database, other_database: Database, types: dict[str, Any]
) -> None:
    """And autogenerate finds nothing to do after them."""
    options = {"table_name": NAMES[TYPES.index(types) % 3], **types}
    name = options["table_name"]
    states = [await catalogue(database, name)]
    assert states == [[]]
    for version in range(1, LATEST_VERSION + 1):
        await upgrade(database.dsn, version, **options)
        states.append(await catalogue(database, name))
    await create_all(other_database.dsn, **options)
    assert states[-1] == await catalogue(other_database, name)
    assert await differences(database.dsn, **options) == []
    for version in range(LATEST_VERSION, 0, -1):
        await downgrade(database.dsn, version, **options)
        states.pop()
        assert await catalogue(database, name) == states[-1]
    assert await tables(database) == []


async def test_the_catalogue_of_these_tests_sees_what_matters(database: Database) -> None:
    """A comparison that saw nothing would always hold."""
    await upgrade_to_latest(database.dsn)
    found = await catalogue(database)
    assert ("taskiq_results_progress", ["fillfactor=50"], b"p", "heap") in found
    assert ("taskiq_results_status", ["fillfactor=50"], b"p", "heap") in found
    assert ("taskiq_results_workers", ["fillfactor=50"], b"p", "heap") in found
    assert ("taskiq_results", "attempt", "integer", True, "0") in found
    assert ("taskiq_results", "expires_at", "timestamp with time zone", False, None) in found
    assert ("taskiq_results", "taskiq_results_pkey", "PRIMARY KEY (task_id)") in found
    indexes = [row[1] for row in found if str(row[1]).startswith("CREATE")]
    assert indexes == [
        "CREATE INDEX taskiq_results_expires_at_idx ON taskiq_results USING btree (expires_at) "
        "WHERE (expires_at IS NOT NULL)",
        "CREATE INDEX taskiq_results_finished_at_idx ON taskiq_results USING brin (finished_at) "
        "WITH (autosummarize='on')",
        "CREATE UNIQUE INDEX taskiq_results_pkey ON taskiq_results USING btree (task_id)",
        "CREATE UNIQUE INDEX taskiq_results_progress_pkey ON taskiq_results_progress "
        "USING btree (task_id)",
        "CREATE UNIQUE INDEX taskiq_results_status_pkey ON taskiq_results_status "
        "USING btree (task_id)",
        "CREATE UNIQUE INDEX taskiq_results_workers_pkey ON taskiq_results_workers "
        "USING btree (worker)",
    ]


async def test_a_schema_is_where_the_tables_go(
    database: Database, other_database: Database
) -> None:
    options = {"table_name": NAMES[1], "schema": other_database.schema}
    await upgrade_to_latest(database.dsn, **options)
    assert await tables(database) == []
    assert await tables(other_database) == sorted(
        f"{NAMES[1]}{suffix}" for suffix in ("", "_progress", "_status", "_workers")
    )
    for version in range(LATEST_VERSION, 0, -1):
        await downgrade(database.dsn, version, **options)
    assert await tables(other_database) == []


async def test_psycopg_builds_the_same(database: Database, other_database: Database) -> None:
    await upgrade_to_latest(database.psycopg_dsn, table_name=NAMES[1])
    await create_all(other_database.psycopg_dsn, table_name=NAMES[1])
    built = await catalogue(database, NAMES[1])
    assert built
    assert built == await catalogue(other_database, NAMES[1])


@pytest.mark.parametrize("version", [0, LATEST_VERSION + 1, "1", None])
async def test_a_version_that_does_not_exist_is_refused(database: Database, version: Any) -> None:
    with pytest.raises(ConfigurationError, match="there is no version"):
        await upgrade(database.dsn, version)
    with pytest.raises(ConfigurationError, match="there is no version"):
        await downgrade(database.dsn, version)


def test_each_step_has_its_revision() -> None:
    revisions = ScriptDirectory(script_location()).walk_revisions()
    expected = [f"{version:04}" for version in range(LATEST_VERSION, 0, -1)]
    assert [revision.revision for revision in revisions] == expected


@pytest.mark.parametrize("convention", ["pk_%(table_name)s", "ix_%(constraint_name)s"])
async def test_an_applications_own_revision_builds_the_same(
    database: Database, other_database: Database, convention: str
) -> None:
    """Whatever naming_convention its metadata has."""
    metadata = sa.MetaData(naming_convention={convention[:2]: convention})

    def upgrade(connection: sa.Connection) -> None:
        for version in range(1, LATEST_VERSION + 1):
            schema.upgrade(operations(connection, target_metadata=metadata), version)

    await on_connection(database.dsn, upgrade)
    await create_all(other_database.dsn)
    assert await catalogue(database) == await catalogue(other_database)


async def test_autogenerate_builds_the_same_from_the_models(
    database: Database, other_database: Database
) -> None:
    metadata = sa.MetaData()
    build_models(metadata=metadata)

    def migrate(connection: sa.Connection) -> None:
        context = MigrationContext.configure(connection)
        script = produce_migrations(context, metadata)
        assert script.upgrade_ops is not None
        for operation in script.upgrade_ops.ops:
            parts = operation.ops if isinstance(operation, ops.ModifyTableOps) else [operation]
            for part in parts:
                Operations(context).invoke(part)

    await on_connection(database.dsn, migrate)
    await upgrade_to_latest(other_database.dsn)
    assert await catalogue(database) == await catalogue(other_database)
