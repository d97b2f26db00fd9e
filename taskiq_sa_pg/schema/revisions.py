"""The schema's versions, for your own Alembic history."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from sqlalchemy import Connection

from taskiq_sa_pg.models import DEFAULT_TABLE_NAME, PayloadField, TableConfig, TaskIdField
from taskiq_sa_pg.schema.catalogue import select_partitions
from taskiq_sa_pg.schema.families import QUEUE, RESULTS

# Alembic passes a name, its kind ("schema", "table", "column", ...) and the names of its parents.
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
    """Upgrades the tables by one step, from `version - 1` to `version`; call it in a revision.

    Args:
        op: Alembic's `op`.
        version: The step. 1, the latest, creates the tables.
        table_name: The results table.
        field_for_task_id: Type of the task-id columns.
        field_for_payload: Type of return_value, error and meta.
        schema: PostgreSQL schema of the tables, which must exist; None uses the search_path.

    Raises:
        ConfigurationError: The version does not exist, or a name or type is invalid.
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
    """Downgrades the tables by one step, from `version` to `version - 1`; step 1 drops them.

    The arguments are those of upgrade().

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
    """Upgrades the broker's tables by one step, from `version - 1` to `version`.

    Args:
        op: Alembic's `op`.
        version: The step. 1, the latest, creates the tables of the queue and of schedules.
        table_name: The results table, from which the names of the broker's tables derive.
        field_for_task_id: Type of the queue's task-id column.
        schema: PostgreSQL schema of the tables, which must exist; None uses the search_path.

    Raises:
        ConfigurationError: The version does not exist, or a name or type is invalid.
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
    """Downgrades the broker's tables by one step, from `version` to `version - 1`.

    Step 1 drops them. The arguments are those of upgrade_queue().

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
    """A hook for Alembic's `context.configure(include_name=...)` in your env.py.

    It hides the package's tables from Alembic, so that `alembic revision --autogenerate` and
    `alembic check` do not drop tables that your metadata does not contain. Hidden are the tables of
    results and of the broker, the version tables, and the partitions of the results table. For
    several results tables, nest the calls. If your metadata contains the models, do not use it; or,
    with partitions, pass `partitions_only=True`.

    Args:
        hook: Your own hook, called for every other name.
        table_name: The results table.
        schema: PostgreSQL schema of the tables; None is the default one, the first of the
            search_path.
        partitions_only: Hide only the partitions of the results table.

    Raises:
        ConfigurationError: A name is invalid.
    """
    config = TableConfig(table_name, schema=schema)
    ours = {
        name
        for family in (RESULTS, QUEUE)
        for name in (*family.table_names(config), family.version_table_name(config))
        if not partitions_only
    }
    # One query for all tables of a command.
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
    """The connection of Alembic's command."""
    # Imported here because Alembic is slow to import; its commands have imported it.
    from alembic import context  # noqa: PLC0415

    try:
        return context.get_bind()
    except (NameError, AttributeError):  # no command runs; one has ended in this process
        return None


def _find_partitions(config: TableConfig, connection: Connection) -> set[tuple[str, str]]:
    """The schemas and names of the partitions of the results table."""
    return {(row.schema_name, row.name) for row in connection.execute(select_partitions(config))}
