"""The tables' schema: its versions for a history of your own, and the check of a database."""

import logging
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg.catalogue import describe_tables
from taskiq_sa_pg.config import DEFAULT_TABLE_NAME, PayloadField, TableConfig, TaskIdField
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.rows import (
    FIRST_FIELDS,
    METADATA_COLUMNS,
    Features,
    ProgressRow,
    ResultRow,
    StatusRow,
)
from taskiq_sa_pg.steps import downgrade_step, upgrade_step
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.upserts import has_metadata_columns

logger = logging.getLogger(__name__)

# What Alembic asks: a name, its kind ("schema", "table", "column", ...), the names above it.
IncludeName = Callable[[str | None, Any, Any], bool]

_REMEDY_FOR_OWN: Final = (
    " (a server_default would fill it, and in the results table extra_values can)"
)


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
        version: The step; 1 makes the tables, 2 adds the columns of TaskMetadataMiddleware, 3
            the table of tasks that have not finished.
        table_name: The results table.
        field_for_task_id: Type of the task-id columns.
        field_for_payload: Type of return_value, error and meta.
        schema: PostgreSQL schema of the tables, which must exist; None is the search_path's.

    Raises:
        ConfigurationError: A version that does not exist, or a name or type that cannot work.
    """
    config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
    upgrade_step(op, version, config)


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
    downgrade_step(op, version, config)


def include_name(
    hook: IncludeName | None = None,
    *,
    table_name: str = DEFAULT_TABLE_NAME,
    schema: str | None = None,
) -> IncludeName:
    """For Alembic's `context.configure(include_name=...)` in an env.py of your own.

    Where your metadata does not know our tables, it keeps `alembic revision --autogenerate` and
    `alembic check` from dropping them: results, progress and version table, and no other. Several
    results tables take one call around the other. Leave it out where the models are in your
    metadata.

    Args:
        hook: Your own, asked about every name that is not one of ours.
        table_name: The results table.
        schema: PostgreSQL schema of the tables; None is the default one, the first of the
            search_path.

    Raises:
        ConfigurationError: A name that cannot work.
    """
    config = TableConfig(table_name, schema=schema)
    ours = {*config.table_names, config.version_table_name}

    def is_included(name: str | None, kind: str, parent_names: Mapping[str, Any]) -> bool:
        if kind == "table" and name in ours:
            found_in = parent_names["schema_name"]
            if found_in == schema or (found_in is None and schema == _default_schema()):
                return False
        return hook is None or hook(name, kind, parent_names)

    return is_included


def _default_schema() -> str | None:
    """The schema that Alembic calls None, as the connection of its command has it."""
    # Here, because Alembic is slow to import, and who is asked this has done so.
    from alembic import context  # noqa: PLC0415

    try:
        connection = context.get_bind()
    except NameError:  # outside of a command
        return None
    return connection.dialect.default_schema_name


def alembic_command(config: TableConfig, command: str) -> str:
    """The command line of an Alembic command for these tables."""
    options = [f"-x {shlex.quote(f'{name}={value}')} " for name, value in _chosen(config)]
    return f"alembic {''.join(options)}{command}"


def _upgrade_commands(config: TableConfig) -> str:
    # The second is at hand where the package is installed, and there is no alembic.ini.
    options = [
        " " + shlex.quote(f"--{name.replace('_', '-')}={value}") for name, value in _chosen(config)
    ]
    return f"`{alembic_command(config, 'upgrade head')}`, `taskiq-sa-pg upgrade{''.join(options)}`"


def _chosen(config: TableConfig) -> Iterator[tuple[str, str]]:
    for option in fields(config):
        value = getattr(config, option.name)
        if value != option.default:
            yield option.name, value


async def check(
    store: Store,
    models: Models,
    timeout: float | None = None,
    *,
    extra_columns: Mapping[str, sa.Column[Any]] = MappingProxyType({}),
    is_tracked: bool = False,
) -> Features:
    """Compares the tables with the models, by one query of the catalogue.

    That the results table lacks METADATA_COLUMNS, as before step 2, is no difference; a status
    table that is absent or unfit is one where tasks are tracked.

    Args:
        store: Where the tables are.
        models: What they should be.
        timeout: For how many seconds a PostgreSQL that does not answer is tried; None for as long
            as the store tries.
        extra_columns: Those of the application's own in the results table that it may fill.
        is_tracked: Whether the status table is needed.

    Returns:
        What the tables have.

    Raises:
        SchemaError: A table is absent or unfit; names the differences and what mends them.
        StorageError: PostgreSQL could not be reached.
    """
    config = store.located(models.config)
    rows = await _describe(store, config, timeout)
    commands = _upgrade_commands(config)
    if not rows:
        raise SchemaError(
            f"tables {config.qualified_name} and {config.qualified_name}_progress do not exist; "
            f"make them with {commands} or run_migrations=True"
        )
    features = _features(models, rows)
    is_step_1 = has_metadata_columns(models) and not features.has_metadata
    may_fill = {column.name for column in extra_columns.values()}
    differences = [
        *_differences_of_results(models, rows, may_fill, is_step_1=is_step_1),
        *_differences(models.progress_table, ProgressRow._fields, "updated_at", rows),
    ]
    if is_tracked:
        differences.extend(_differences_of_status(models, rows))
    if differences:
        raise SchemaError(
            f"the results backend cannot use its tables: {'; '.join(differences)}. Make them, "
            f"or bring them up to date, with {commands} or run_migrations=True. If a table "
            "belongs to something else, choose another table_name; if only a type differs, pass "
            "the field_for_... that it was made with"
        )
    if is_step_1:
        logger.warning(
            "table %s is as an earlier release made it: it lacks columns of %s, and what "
            "TaskMetadataMiddleware has for them is left out; %s or run_migrations=True adds them",
            *(config.qualified_name, ", ".join(METADATA_COLUMNS), commands),
        )
    return features


async def find_features(store: Store, models: Models) -> Features:
    """What the tables have of the later steps, whatever is the matter with them else.

    Raises:
        StorageError: PostgreSQL could not be reached.
    """
    return _features(models, await _describe(store, store.located(models.config), None))


async def _describe(
    store: Store, config: TableConfig, timeout: float | None
) -> Sequence[sa.Row[Any]]:
    async def describe(connection: AsyncConnection) -> list[sa.Row[Any]]:
        return list((await connection.execute(describe_tables(config))).all())

    purpose = f"check the schema of table {config.qualified_name}"
    return await store.transact(describe, purpose, retry_timeout=timeout)


def _features(models: Models, rows: Sequence[sa.Row[Any]]) -> Features:
    names = {row.column_name for row in rows if row.table_name == models.config.table_name}
    has_status = models.status_table is not None and not _differences_of_status(models, rows)
    return Features(names.issuperset(METADATA_COLUMNS), has_status)


def _differences_of_results(
    models: Models, rows: Sequence[sa.Row[Any]], may_fill: Collection[str], *, is_step_1: bool
) -> list[str]:
    has_metadata = has_metadata_columns(models) and not is_step_1
    return _differences(
        models.results_table,
        ResultRow._fields if has_metadata else FIRST_FIELDS,
        "finished_at",
        rows,
        may_fill=may_fill,
        may_lack=METADATA_COLUMNS if is_step_1 else (),
    )


def _differences_of_status(models: Models, rows: Sequence[sa.Row[Any]]) -> list[str]:
    assert models.status_table is not None
    return _differences(models.status_table, StatusRow._fields, "updated_at", rows)


def _differences(
    expected: sa.Table,
    written: Sequence[str],
    stamp: str,
    rows: Sequence[sa.Row[Any]],
    *,
    may_fill: Collection[str] = (),
    may_lack: Collection[str] = (),
) -> list[str]:
    table = expected.name
    found = {row.column_name: row for row in rows if row.table_name == table}
    if not found:
        return [f"table {expected.fullname} does not exist"]
    differences = []
    for column in expected.c:
        if column.name in may_lack:
            continue
        name, is_ours = column.name, column.name in {*written, stamp}
        if name not in found:
            whose = "" if is_ours else " (one of your model's own, for a migration of your own)"
            differences.append(f"column {table}.{name} is missing{whose}")
        # What others call a type of their own is not for us to compare.
        elif is_ours and found[name].type_name != (wanted := _type_name(column.type)):
            differences.append(
                f"column {table}.{name} is {found[name].type_name} and should be {wanted}"
            )
    if "task_id" in found and not found["task_id"].is_unique:
        differences.append(f"column {table}.task_id is neither primary key nor unique")
    differences.extend(
        f"column {table}.{name} is NOT NULL without a default, and the backend may leave it empty"
        + ("" if name in {*written, stamp} else _REMEDY_FOR_OWN)
        for name, row in found.items()
        if row.is_required and name not in may_fill and not _is_filled(expected, name, written)
    )
    return differences


def _is_filled(expected: sa.Table, name: str, written: Sequence[str]) -> bool:
    """Whether every INSERT has a value for the column, be it a default of the model's."""
    if name in written:
        return not expected.c[name].nullable
    return any(column.name == name and column.default is not None for column in expected.c)


def _type_name(wanted: sa.types.TypeEngine[Any]) -> str:
    name = wanted.compile(dialect=postgresql.dialect()).lower()  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    return "character varying" if name == "varchar" else name
