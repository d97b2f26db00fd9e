"""Compares the tables in a database with the models, and names the remedy."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.models import Models, TableConfig
from taskiq_sa_pg.schema.catalogue import (
    describe_columns,
    is_of_taskiq_postgres,
    select_closed_schemas,
    select_is_distributed,
)
from taskiq_sa_pg.schema.families import QUEUE, RESULTS, Family
from taskiq_sa_pg.statements import ProgressRow, ResultRow, StatusRow

_READS_ONLY: Final = (
    ". A process that only reads results needs just SELECT: set "
    'check_schema="warn" there, which logs this and continues'
)


class _Expected(NamedTuple):
    """A table of the models, and how its columns are used.

    Attributes:
        table: From the models.
        written: Our columns that every INSERT sets, possibly to NULL; the key first.
        defaulted: Our other columns.
        fillable: The application's additional columns that can get a value.
    """

    table: sa.Table
    written: Sequence[str]
    defaulted: Sequence[str] = ()
    fillable: Collection[str] = ()


def alembic_command(config: TableConfig, *command: str, queue: str | None = None) -> str:
    """An Alembic command line for these tables, with the option `queue`."""
    chosen = [*_chosen(config), *([("queue", queue)] if queue else [])]
    options = [part for name, value in chosen for part in ("-x", f"{name}={value}")]
    return shlex.join(["alembic", *options, *command])


def own_command(config: TableConfig, *command: str) -> str:
    """A `taskiq-sa-pg` command line for these tables."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in _chosen(config)]
    return shlex.join(["taskiq-sa-pg", *command, *options])


def upgrade_commands(config: TableConfig, family: Family) -> str:
    """The command lines that upgrade these tables to the latest version, for a message."""
    # The broker's together with the results' tables, because it stores results of parked tasks.
    queue, flags = ("true", ["--queue"]) if family is QUEUE else (None, [])
    alembic = alembic_command(config, "upgrade", "head", queue=queue)
    # The second works without an alembic.ini.
    return f"`{alembic}`, `{own_command(config, 'upgrade', *flags)}`"


def _chosen(config: TableConfig) -> list[tuple[str, str]]:
    options = [(option, getattr(config, option.name)) for option in fields(config)]
    return [(option.name, value) for option, value in options if value != option.default]


async def check(
    database: Database,
    models: Models,
    timeout: float | None = None,
    *,
    extra_columns: Mapping[str, sa.Column[Any]] = MappingProxyType({}),
    is_provisioned: bool = False,
) -> bool:
    """Compares the tables with the models, in one catalogue query.

    Args:
        database: The database.
        models: The models.
        timeout: Seconds to retry if PostgreSQL cannot be reached; None is the default.
        extra_columns: The application's additional columns of the results table that it may fill.
        is_provisioned: Whether the tables have just been upgraded to the latest version.

    Returns:
        Whether Citus distributes the rows of the results.

    Raises:
        SchemaError: A table is missing or does not match, or the role lacks a privilege; names the
            differences and the remedy.
    """
    filled = {each.name for each in extra_columns.values()}
    expected = [
        _Expected(models.results_table, ResultRow._fields, ["finished_at"], filled),
        _Expected(models.progress_table, ProgressRow._fields, ["updated_at"]),
    ]
    if models.status_table is not None:
        expected.append(_Expected(models.status_table, StatusRow._fields, ["updated_at"]))
    if models.workers_table is not None:
        expected.append(_Expected(models.workers_table, ["worker", "started_at"], ["seen_at"]))
    rows = await _check(database, models, RESULTS, expected, timeout, is_provisioned=is_provisioned)
    if not rows[0].has_citus:
        return False
    config = located(database, models.config)
    statement = select_is_distributed(config.table_name, config.schema)
    purpose = f"check whether table {config.qualified_name} is distributed"
    [[is_distributed]] = await _fetch(database, statement, purpose, timeout)
    return bool(is_distributed)


async def check_queue(
    database: Database,
    models: Models,
    timeout: float | None = None,
    *,
    is_provisioned: bool = False,
) -> None:
    """Compares the broker's tables with the models; see check().

    The schedules table is checked only if there is a model of it.

    Raises:
        SchemaError: As check().
    """
    ours = {table.name: table for table in QUEUE.metadata(models.config).tables.values()}
    used = (models.queue_table, models.schedules_table)
    expected = [_Expected(t, ours[t.name].c.keys()) for t in used if t is not None]
    await _check(database, models, QUEUE, expected, timeout, is_provisioned=is_provisioned)


async def _check(
    database: Database,
    models: Models,
    family: Family,
    expected: Sequence[_Expected],
    timeout: float | None,
    *,
    is_provisioned: bool,
) -> list[sa.Row[Any]]:
    config = located(database, models.config)
    place = family.place(config)
    purpose = f"check the schema of table {place}"
    described = describe_columns(family.table_names(config), config.schema)
    rows = await _fetch(database, described, purpose, timeout)
    if not rows:
        hidden = ""
        if config.schema is None:
            hidden = await _hint_hidden(database, family.table_names(config)[0], purpose, timeout)
        raise SchemaError(
            f"table {place} and the other tables of the {family.user} do not exist; create them "
            f"with {upgrade_commands(config, family)} or run_migrations=True{hidden}"
        )
    if family is RESULTS and _is_old(rows, config):
        raise SchemaError(f"cannot use table {place}: {old_table_remedy(config)}")
    differences, additional = _compare(family, expected, rows)
    remedy = _remedy(config, family, is_provisioned=is_provisioned) if differences else ""
    if differences or additional:
        raise SchemaError(
            f"the {family.user} cannot use its tables: "
            f"{'; '.join((*differences, *additional))}{remedy}"
        )
    _check_rights(family, place, {each.table.name for each in expected}, rows)
    return rows


async def _fetch(
    database: Database, statement: sa.Select[Any], purpose: str, timeout: float | None
) -> list[sa.Row[Any]]:
    async def fetch(connection: AsyncConnection) -> list[sa.Row[Any]]:
        return list((await connection.execute(statement)).all())

    return await database.transact(fetch, purpose, retry_timeout=timeout)


async def is_old_table(database: Database, config: TableConfig, timeout: float | None) -> bool:
    """Whether the results table is one of taskiq-postgres."""
    described = describe_columns([config.table_name], config.schema)
    purpose = f"check table {config.qualified_name}"
    return _is_old(await _fetch(database, described, purpose, timeout), config)


def _is_old(rows: Sequence[sa.Row[Any]], config: TableConfig) -> bool:
    types = {row.column_name: row.type_name for row in rows if row.table_name == config.table_name}
    return is_of_taskiq_postgres(types) and "is_err" not in types


async def _hint_hidden(
    database: Database, table_name: str, purpose: str, timeout: float | None
) -> str:
    """The GRANT that is needed if the table is in a schema that the role may not use."""
    rows = await _fetch(database, select_closed_schemas(table_name), purpose, timeout)
    for schema, role, search_path in map(tuple, rows):
        path = [part.strip().strip('"') for part in search_path.split(",")]
        if schema in path or (schema == role and "$user" in path):
            grant = f"GRANT USAGE ON SCHEMA {_quote(schema)} TO {_quote(role)}"
            return f". If you mean those in schema {schema}, run `{grant}` as its owner"
    return ""


def old_table_remedy(config: TableConfig) -> str:
    """The remedy if the results table is one of taskiq-postgres."""
    name = "results" if config.table_name != "results" else "task_results"
    new = replace(config, table_name=name)
    source = [f"--from-table={config.table_name}"]
    if config.schema is not None:
        source.append(f"--from-schema={config.schema}")
    copy = own_command(new, "import-results", *source)
    return (
        "it is a table of taskiq-postgres. Keep it, choose another table_name "
        f'(table_name="{name}"), create the tables with `{own_command(new, "upgrade")}`, and copy '
        f"the results with `{copy}`"
    )


def _remedy(config: TableConfig, family: Family, *, is_provisioned: bool) -> str:
    """The remedy if tables differ from the models."""
    flags = ["--queue-only"] if family is QUEUE else []
    expected = f"`{own_command(config, 'sql', *flags)}` prints their definition"
    if is_provisioned:
        remedy = f"They have the latest version, and were changed since: {expected}"
    else:
        remedy = (
            f"Create or upgrade them with {upgrade_commands(config, family)} or "
            "run_migrations=True. If they have the latest version "
            f"(`{own_command(config, 'current', *flags)}`), they were changed since: {expected}"
        )
    return (
        f". {remedy}. If a table belongs to another program, choose another table_name; if only a "
        "type differs, pass the field_for_... that the table was created with"
    )


def _check_rights(
    family: Family, place: str, names: Collection[str], rows: Sequence[sa.Row[Any]]
) -> None:
    found = {row.table_name: row for row in rows if row.table_name in names}.values()
    grants = [
        f"GRANT USAGE ON SCHEMA {_quote(schema)}"
        for schema in {row.schema_name for row in found if not row.is_open}
    ]
    for rights in dict.fromkeys(row.missing_rights for row in found if row.missing_rights):
        lacking = [row for row in found if row.missing_rights == rights]
        places = [f"{_quote(row.schema_name)}.{_quote(row.table_name)}" for row in lacking]
        grants.append(f"GRANT {rights} ON {', '.join(places)}")
    if not grants:
        return
    role = rows[0].role_name
    statements = "; ".join(f"{grant} TO {_quote(role)}" for grant in grants)
    may_read = family is RESULTS and all(
        row.is_open and "SELECT" not in row.missing_rights for row in found
    )
    raise SchemaError(
        f"role {role} lacks privileges that the {family.user} needs on table {place} and its "
        f"other tables: run `{statements}` as their owner{_READS_ONLY if may_read else ''}"
    )


def _quote(name: str) -> str:
    # With named parameters, percent signs are not doubled.
    dialect = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    quoted: str = dialect.identifier_preparer.quote(name)
    return quoted


def located(database: Database, config: TableConfig) -> TableConfig:
    """The configuration with the real schema, after the engine's `schema_translate_map`."""
    return replace(config, schema=database.schema_of(config.schema))


def _compare(
    family: Family, expected: Sequence[_Expected], rows: Sequence[sa.Row[Any]]
) -> tuple[list[str], list[str]]:
    """The differences in our columns, and those in the application's additional columns."""
    differences: list[str] = []
    additional: list[str] = []
    for each in expected:
        found = {row.column_name: row for row in rows if row.table_name == each.table.name}
        if not found:
            differences.append(f"table {each.table.fullname} does not exist")
            continue
        differences += _differences(family, each, found)
        additional += _additional_differences(family, each, found)
    return differences, additional


def _differences(
    family: Family, expected: _Expected, found: Mapping[str, sa.Row[Any]]
) -> list[str]:
    table, written, differences = expected.table.name, expected.written, []
    for name in (*written, *expected.defaulted):
        wanted = _type_name(expected.table.c[name].type)
        if name not in found:
            differences.append(f"column {table}.{name} is missing")
        elif found[name].type_name != wanted:
            differences.append(
                f"column {table}.{name} is {found[name].type_name} and must be {wanted}"
            )
        elif found[name].is_required and not _is_filled(expected.table, name, written):
            differences.append(
                f"column {table}.{name} is NOT NULL without a default, and the {family.user} may "
                "leave it empty"
            )
    key = written[0]
    if key in found and not found[key].is_unique:
        differences.append(f"column {table}.{key} is neither primary key nor unique")
    return differences


def _additional_differences(
    family: Family, expected: _Expected, found: Mapping[str, sa.Row[Any]]
) -> list[str]:
    table = expected.table
    ours = {*expected.written, *expected.defaulted}
    differences = [
        f"column {table.name}.{column.name} is missing (your model adds it: create it in your own "
        "migration)"
        for column in table.c
        if column.name not in ours and column.name not in found
    ]
    remedy = "add a server_default"
    if family is RESULTS:
        remedy += " or, in the results table, fill it with extra_values"
    # Their types are not compared: the models may use types that are unknown here.
    differences += [
        f"column {table.name}.{name} is NOT NULL without a default, and the {family.user} may "
        f"leave it empty ({remedy})"
        for name, row in found.items()
        if row.is_required
        and name not in {*ours, *expected.fillable}
        and not _is_filled(table, name, ())
    ]
    return differences


def _is_filled(expected: sa.Table, name: str, written: Sequence[str]) -> bool:
    """Whether every INSERT sets the column, perhaps from a default of the model."""
    if name in written:
        return not expected.c[name].nullable
    return any(column.name == name and column.default is not None for column in expected.c)


def _type_name(wanted: sa.types.TypeEngine[Any]) -> str:
    name = wanted.compile(dialect=postgresql.dialect()).lower()  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    return "character varying" if name == "varchar" else name
