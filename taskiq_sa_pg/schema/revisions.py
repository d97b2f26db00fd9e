"""The schema's versions, for an Alembic history of your own."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from sqlalchemy import Connection

from taskiq_sa_pg.models import DEFAULT_TABLE_NAME, PayloadField, TableConfig, TaskIdField
from taskiq_sa_pg.schema.catalogue import select_partitions
from taskiq_sa_pg.schema.families import QUEUE, RESULTS

# What Alembic asks: a name, its kind ("schema", "table", "column", ...), the names above it.
IncludeName = Callable[[str | None, Any, Any], bool]


def upgrade(
    op: Any,
    version: int,
    *,
    table_name: str = DEFAULT_TABLE_NAME,
    field_for_task_id: TaskIdField = "VarChar",
    field_for_payload: PayloadField = "Bytea",
    schema: str | None = None,
) -> None:
    """Takes the tables from version - 1 to version: one step, for a revision of your own.

    Args:
        op: Alembic's `op`.
        version: The step; 1, the latest, makes the tables.
        table_name: The results table.
        field_for_task_id: Type of the task-id columns.
        field_for_payload: Type of return_value, error and meta.
        schema: PostgreSQL schema of the tables, which must exist; None is the search_path's.

    Raises:
        ConfigurationError: A version that does not exist, or a name or type that cannot work.
    """
    config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
    RESULTS.step(version).upgrade(op, config, config.table_names)


def downgrade(
    op: Any,
    version: int,
    *,
    table_name: str = DEFAULT_TABLE_NAME,
    field_for_task_id: TaskIdField = "VarChar",
    field_for_payload: PayloadField = "Bytea",
    schema: str | None = None,
) -> None:
    """Takes the tables from version back to version - 1; of step 1, drops them.

    Arguments as upgrade().

    Raises:
        ConfigurationError: As upgrade().
    """
    config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
    RESULTS.step(version).downgrade(op, config)


def upgrade_queue(
    op: Any,
    version: int,
    *,
    table_name: str = DEFAULT_TABLE_NAME,
    field_for_task_id: TaskIdField = "VarChar",
    schema: str | None = None,
) -> None:
    """Takes the broker's tables from version - 1 to version, for a revision of your own.

    Args:
        op: Alembic's `op`.
        version: The step; 1, the latest, makes the tables of the queue and of schedules.
        table_name: The results table, after which the broker's are named.
        field_for_task_id: Type of the queue's task-id column.
        schema: PostgreSQL schema of the tables, which must exist; None is the search_path's.

    Raises:
        ConfigurationError: A version that does not exist, or a name or type that cannot work.
    """
    config = TableConfig(table_name, field_for_task_id, schema=schema)
    QUEUE.step(version).upgrade(op, config, config.queue_table_names)


def downgrade_queue(
    op: Any,
    version: int,
    *,
    table_name: str = DEFAULT_TABLE_NAME,
    field_for_task_id: TaskIdField = "VarChar",
    schema: str | None = None,
) -> None:
    """Takes the broker's tables from version back to version - 1; of step 1, drops them.

    Arguments as upgrade_queue().

    Raises:
        ConfigurationError: As upgrade_queue().
    """
    config = TableConfig(table_name, field_for_task_id, schema=schema)
    QUEUE.step(version).downgrade(op, config)


def include_name(
    hook: IncludeName | None = None,
    *,
    table_name: str = DEFAULT_TABLE_NAME,
    schema: str | None = None,
    partitions_only: bool = False,
) -> IncludeName:
    """For Alembic's `context.configure(include_name=...)` in an env.py of your own.

    Where your metadata does not know our tables, it keeps `alembic revision --autogenerate` and
    `alembic check` from dropping them, the broker's, the version tables and the partitions of the
    results table included. Several results tables take one call around the other. Where the models
    are in your metadata, leave it out, or say `partitions_only=True` if there are partitions.

    Args:
        hook: Your own, asked about every name that is not one of ours.
        table_name: The results table.
        schema: PostgreSQL schema of the tables; None is the default one, the first of the
            search_path.
        partitions_only: Only the partitions of the results table are left out.

    Raises:
        ConfigurationError: A name that cannot work.
    """
    config = TableConfig(table_name, schema=schema)
    ours = {
        name
        for family in (RESULTS, QUEUE)
        for name in (*family.table_names(config), family.version_table_name(config))
        if not partitions_only
    }
    # Once for all tables of a command.
    partitions = lru_cache(1)(partial(_find_partitions, config))

    def is_included(name: str | None, kind: str, parent_names: Mapping[str, Any]) -> bool:
        if kind == "table":
            connection, found_in = _connection(), parent_names["schema_name"]
            default = None if connection is None else connection.dialect.default_schema_name
            if name in ours and (found_in == schema or (found_in is None and schema == default)):
                return False
            if connection is not None and (found_in or default, name) in partitions(connection):
                return False
        return hook is None or hook(name, kind, parent_names)

    return is_included


def _connection() -> Connection | None:
    """That of Alembic's command."""
    # Here, because Alembic is slow to import, and who is asked this has done so.
    from alembic import context  # noqa: PLC0415

    try:
        return context.get_bind()
    except (NameError, AttributeError):  # outside of a command; after one in this process
        return None


def _find_partitions(config: TableConfig, connection: Connection) -> set[tuple[str, str]]:
    """The schemas and names of the partitions of the results table."""
    return {(row.schema_name, row.name) for row in connection.execute(select_partitions(config))}
