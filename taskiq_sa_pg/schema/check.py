"""What the tables in a database really are, compared with the models; and how to mend them."""

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

_ONLY_ASKS: Final = (
    ". A process that only asks for results needs SELECT alone: give it "
    'check_schema="warn", which logs this and goes on'
)


class _Expected(NamedTuple):
    """A table of the models, and what is done with its columns.

    Attributes:
        table: As the models describe it.
        written: Our columns that get a value in every INSERT, though it may be NULL; the key first.
        defaulted: Our other columns.
        fillable: Columns of the application's own that can get a value.
    """

    table: sa.Table
    written: Sequence[str]
    defaulted: Sequence[str] = ()
    fillable: Collection[str] = ()


def alembic_command(config: TableConfig, *command: str, queue: str | None = None) -> str:
    """The command line of an Alembic command for these tables, with a choice of families."""
    chosen = [*_chosen(config), *([("queue", queue)] if queue else [])]
    options = [part for name, value in chosen for part in ("-x", f"{name}={value}")]
    return shlex.join(["alembic", *options, *command])


def own_command(config: TableConfig, *command: str) -> str:
    """The command line of one of our commands for these tables."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in _chosen(config)]
    return shlex.join(["taskiq-sa-pg", *command, *options])


def upgrade_commands(config: TableConfig, family: Family) -> str:
    """The command lines that bring these tables to the latest version, for a message."""
    # The broker's with those of the results, of which it stores some.
    queue, flags = ("true", ["--queue"]) if family is QUEUE else (None, [])
    alembic = alembic_command(config, "upgrade", "head", queue=queue)
    # The second is at hand where the package is installed, and there is no alembic.ini.
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
    """Compares the tables with the models, by one query of the catalogue.

    A silent PostgreSQL is tried for `timeout` seconds, with None for as long as usual. The
    extra_columns are those of the application's own in the results table that it may fill.
    is_provisioned says that the tables have just been brought to the latest version.

    Returns:
        Whether Citus distributes the rows of the results.

    Raises:
        SchemaError: A table is absent or unfit, or the role lacks a right; names the differences
            and what mends them.
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
    purpose = f"look how table {config.qualified_name} is distributed"
    [[is_distributed]] = await _fetch(database, statement, purpose, timeout)
    return bool(is_distributed)


async def check_queue(
    database: Database,
    models: Models,
    timeout: float | None = None,
    *,
    is_provisioned: bool = False,
) -> None:
    """Compares the broker's tables with the models, as check() does those of the results.

    The table of schedules counts where there is a model of it.

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
            hidden = await _tell_hidden(database, family.table_names(config)[0], purpose, timeout)
        raise SchemaError(
            f"table {place} and those that go with it do not exist; make them "
            f"with {upgrade_commands(config, family)} or run_migrations=True{hidden}"
        )
    if family is RESULTS and _is_old(rows, config):
        raise SchemaError(f"cannot use table {place}: {old_table_remedy(config)}")
    differences, flaws_of_own = _compare(family, expected, rows)
    remedy = _remedy(config, family, is_provisioned=is_provisioned) if differences else ""
    if differences or flaws_of_own:
        raise SchemaError(
            f"the {family.user} cannot use its tables: "
            f"{'; '.join((*differences, *flaws_of_own))}{remedy}"
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
    """Whether a table of taskiq-postgres has the place of our results table."""
    described = describe_columns([config.table_name], config.schema)
    purpose = f"look at table {config.qualified_name}"
    return _is_old(await _fetch(database, described, purpose, timeout), config)


def _is_old(rows: Sequence[sa.Row[Any]], config: TableConfig) -> bool:
    types = {row.column_name: row.type_name for row in rows if row.table_name == config.table_name}
    return is_of_taskiq_postgres(types) and "is_err" not in types


async def _tell_hidden(
    database: Database, table_name: str, purpose: str, timeout: float | None
) -> str:
    """What to grant where the search_path leads to the table, and the role may not go there."""
    rows = await _fetch(database, select_closed_schemas(table_name), purpose, timeout)
    for schema, role, search_path in map(tuple, rows):
        path = [part.strip().strip('"') for part in search_path.split(",")]
        if schema in path or (schema == role and "$user" in path):
            grant = f"GRANT USAGE ON SCHEMA {_quote(schema)} TO {_quote(role)}"
            return f". If they are those of schema {schema}, run `{grant}` as its owner"
    return ""


def old_table_remedy(config: TableConfig) -> str:
    """What to do about a table of taskiq-postgres in the place of ours."""
    name = "results" if config.table_name != "results" else "task_results"
    new = replace(config, table_name=name)
    source = [f"--from-table={config.table_name}"]
    if config.schema is not None:
        source.append(f"--from-schema={config.schema}")
    copy = own_command(new, "import-results", *source)
    return (
        "it is one of taskiq-postgres. Leave it as it is, choose another table_name for ours "
        f'(table_name="{name}"), make them with `{own_command(new, "upgrade")}`, and bring over '
        f"what it holds with `{copy}`"
    )


def _remedy(config: TableConfig, family: Family, *, is_provisioned: bool) -> str:
    """What mends tables that are not as a version makes them."""
    flags = ["--queue-only"] if family is QUEUE else []
    as_made = f"`{own_command(config, 'sql', *flags)}` prints what they should be"
    if is_provisioned:
        remedy = f"They are of the latest version, and were changed since: {as_made}"
    else:
        remedy = (
            f"Make them, or bring them up to date, with {upgrade_commands(config, family)} or "
            "run_migrations=True. If they are of the latest version "
            f"(`{own_command(config, 'current', *flags)}`), they were changed since: {as_made}"
        )
    return (
        f". {remedy}. If a table belongs to something else, choose another table_name; if only a "
        "type differs, pass the field_for_... that it was made with"
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
    may_ask = family is RESULTS and all(
        row.is_open and "SELECT" not in row.missing_rights for row in found
    )
    raise SchemaError(
        f"role {role} lacks rights that the {family.user} needs on table {place} and those that "
        f"go with it: run `{statements}` as their owner{_ONLY_ASKS if may_ask else ''}"
    )


def _quote(name: str) -> str:
    # With named parameters no percent sign is doubled.
    dialect = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    quoted: str = dialect.identifier_preparer.quote(name)
    return quoted


def located(database: Database, config: TableConfig) -> TableConfig:
    """Where the tables really are, whatever the engine's `schema_translate_map` says."""
    return replace(config, schema=database.schema_of(config.schema))


def _compare(
    family: Family, expected: Sequence[_Expected], rows: Sequence[sa.Row[Any]]
) -> tuple[list[str], list[str]]:
    """How tables differ from ours, and what is wrong with columns of the application's own."""
    differences: list[str] = []
    flaws_of_own: list[str] = []
    for each in expected:
        found = {row.column_name: row for row in rows if row.table_name == each.table.name}
        if not found:
            differences.append(f"table {each.table.fullname} does not exist")
            continue
        differences += _differences(family, each, found)
        flaws_of_own += _flaws_of_own(family, each, found)
    return differences, flaws_of_own


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
                f"column {table}.{name} is {found[name].type_name} and should be {wanted}"
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


def _flaws_of_own(
    family: Family, expected: _Expected, found: Mapping[str, sa.Row[Any]]
) -> list[str]:
    table = expected.table
    ours = {*expected.written, *expected.defaulted}
    flaws = [
        f"column {table.name}.{column.name} is missing (one of your model's own, for a migration "
        "of your own)"
        for column in table.c
        if column.name not in ours and column.name not in found
    ]
    filling = "a server_default would fill it"
    if family is RESULTS:
        filling += ", and in the results table extra_values can"
    # What others call a type of their own is not for us to compare.
    flaws += [
        f"column {table.name}.{name} is NOT NULL without a default, and the {family.user} may "
        f"leave it empty ({filling})"
        for name, row in found.items()
        if row.is_required
        and name not in {*ours, *expected.fillable}
        and not _is_filled(table, name, ())
    ]
    return flaws


def _is_filled(expected: sa.Table, name: str, written: Sequence[str]) -> bool:
    """Whether every INSERT has a value for the column, be it a default of the model's."""
    if name in written:
        return not expected.c[name].nullable
    return any(column.name == name and column.default is not None for column in expected.c)


def _type_name(wanted: sa.types.TypeEngine[Any]) -> str:
    name = wanted.compile(dialect=postgresql.dialect()).lower()  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    return "character varying" if name == "varchar" else name
