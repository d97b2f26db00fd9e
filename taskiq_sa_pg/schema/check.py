"""What the tables in a database really are, compared with the models; and how to mend them."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.models import Models, TableConfig
from taskiq_sa_pg.schema.catalogue import describe_columns
from taskiq_sa_pg.statements import ProgressRow, ResultRow, StatusRow


def alembic_command(config: TableConfig, *command: str) -> str:
    """The command line of an Alembic command for these tables."""
    options = [part for name, value in _chosen(config) for part in ("-x", f"{name}={value}")]
    return shlex.join(["alembic", *options, *command])


def _upgrade_commands(config: TableConfig) -> str:
    # The second is at hand where the package is installed, and there is no alembic.ini.
    options = [f"--{name.replace('_', '-')}={value}" for name, value in _chosen(config)]
    ours = shlex.join(["taskiq-sa-pg", "upgrade", *options])
    return f"`{alembic_command(config, 'upgrade', 'head')}`, `{ours}`"


def _chosen(config: TableConfig) -> list[tuple[str, str]]:
    options = [(option, getattr(config, option.name)) for option in fields(config)]
    return [(option.name, value) for option, value in options if value != option.default]


async def check(
    database: Database,
    models: Models,
    timeout: float | None = None,
    *,
    extra_columns: Mapping[str, sa.Column[Any]] = MappingProxyType({}),
) -> None:
    """Compares the tables with the models, by one query of the catalogue.

    A silent PostgreSQL is tried for `timeout` seconds, with None for as long as usual. The
    extra_columns are those of the application's own in the results table that it may fill.

    Raises:
        SchemaError: A table is absent or unfit; names the differences and what mends them.
    """
    config = located(database, models.config)

    async def describe(connection: AsyncConnection) -> list[sa.Row[Any]]:
        described = describe_columns(config.table_names, config.schema)
        return list((await connection.execute(described)).all())

    purpose = f"check the schema of table {config.qualified_name}"
    rows = await database.transact(describe, purpose, retry_timeout=timeout)
    commands = _upgrade_commands(config)
    if not rows:
        raise SchemaError(
            f"table {config.qualified_name} and those that go with it do not exist; make them "
            f"with {commands} or run_migrations=True"
        )
    may_fill = {column.name for column in extra_columns.values()}
    differences = [
        *_differences(models.results_table, ResultRow._fields, "finished_at", rows, may_fill),
        *_differences(models.progress_table, ProgressRow._fields, "updated_at", rows),
    ]
    if models.status_table is not None:
        differences += _differences(models.status_table, StatusRow._fields, "updated_at", rows)
    if differences:
        raise SchemaError(
            f"the results backend cannot use its tables: {'; '.join(differences)}. Make them, "
            f"or bring them up to date, with {commands} or run_migrations=True. If a table "
            "belongs to something else, choose another table_name; if only a type differs, pass "
            "the field_for_... that it was made with"
        )


def located(database: Database, config: TableConfig) -> TableConfig:
    """Where the tables really are, whatever the engine's `schema_translate_map` says."""
    return replace(config, schema=database.schema_of(config.schema))


def _differences(
    expected: sa.Table,
    written: Sequence[str],
    stamp: str,
    rows: Sequence[sa.Row[Any]],
    may_fill: Collection[str] = (),
) -> list[str]:
    table = expected.name
    found = {row.column_name: row for row in rows if row.table_name == table}
    if not found:
        return [f"table {expected.fullname} does not exist"]
    ours = {*written, stamp}
    differences = []
    for column in expected.c:
        name = column.name
        own = "" if name in ours else " (one of your model's own, for a migration of your own)"
        if name not in found:
            differences.append(f"column {table}.{name} is missing{own}")
        # What others call a type of their own is not for us to compare.
        elif name in ours and found[name].type_name != (wanted := _type_name(column.type)):
            differences.append(
                f"column {table}.{name} is {found[name].type_name} and should be {wanted}"
            )
    if "task_id" in found and not found["task_id"].is_unique:
        differences.append(f"column {table}.task_id is neither primary key nor unique")
    for name, row in found.items():
        remedy = " (a server_default would fill it, and in the results table extra_values can)"
        if row.is_required and name not in may_fill and not _is_filled(expected, name, written):
            differences.append(
                f"column {table}.{name} is NOT NULL without a default, and the backend may leave "
                f"it empty{'' if name in ours else remedy}"
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
