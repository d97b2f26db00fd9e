"""The schema's steps carried out, by an Alembic command or at startup.

The only user of Alembic. Each results table has a version table of its own: with a shared one,
Alembic would take the second table for made.
"""

import asyncio
import io
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, TextIO

import sqlalchemy as sa
from alembic import command, context
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy.sql.elements import quoted_name

from taskiq_sa_pg.database import Database, reason_of
from taskiq_sa_pg.exceptions import ConfigurationError, SchemaError, StorageError, TaskiqSaPgError
from taskiq_sa_pg.models import TableConfig, build_models
from taskiq_sa_pg.schema.check import alembic_command, located
from taskiq_sa_pg.schema.steps import LATEST_VERSION, upgrade_step
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

_ENVIRONMENT_PREFIX: Final = "TASKIQ_SA_PG_"
_OPTIONS: Final = tuple(option.name for option in fields(TableConfig))

_REVISIONS: Final = f"the revisions are base, {LATEST_VERSION:04} and head"


def script_location() -> str:
    """The directory of the Alembic environment, `taskiq_sa_pg:_migrations` once installed."""
    package = Path(__file__).parents[1]
    installed, checkout = package / "_migrations", package.parent / "migrations"
    return str(installed if installed.is_dir() else checkout)


async def provision(
    database: Database,
    config: TableConfig,
    timeout: float | None = None,
    timings: Timings = DEFAULT_TIMINGS,
) -> None:
    """Brings the tables to the latest version, whoever else is at it at the same time.

    The steps that are missing run in one transaction under an advisory lock, and are recorded
    in the version table as `alembic upgrade head` records them.

    Raises:
        SchemaError: The tables cannot be made; says why and what to do.
        StorageError: PostgreSQL could not be reached for `timeout` seconds, or for as long as the
            database tries.
    """

    def upgrade(connection: sa.Connection, config: TableConfig) -> None:
        # The configuration has been translated already, and Alembic's own looks never are.
        connection = connection.execution_options(schema_translate_map=None)
        _lock(connection, config, timings)
        # Not through alembic.command: its `op` and `context` are global, and two backends that
        # start at the same time would run each other's migrations.
        opts = {"fn": None, **_version_table(config)}
        migration_context = MigrationContext.configure(connection, opts=opts)
        current = max(map(int, migration_context.get_current_heads()), default=0)
        pending = range(current + 1, LATEST_VERSION + 1)
        for version in pending:
            upgrade_step(Operations(migration_context), version, config)
        if pending:
            migration_context.stamp(ScriptDirectory(script_location()), f"{LATEST_VERSION:04}")

    await _in_transaction(database, located(database, config), upgrade, timeout)


async def _in_transaction(
    database: Database,
    config: TableConfig,
    work: Callable[[sa.Connection, TableConfig], None],
    timeout: float | None,
) -> None:
    purpose = f"bring table {config.qualified_name} up to date"
    try:
        # Without a limit: a step may have to build an index, or to wait for another process.
        await database.transact(
            lambda connection: connection.run_sync(work, config),
            purpose,
            is_limited=False,
            retry_timeout=timeout,
        )
    except StorageError as exc:
        remedy = _remedies(config).get(exc.sqlstate or "")
        if remedy is None or not isinstance(exc.__cause__, Exception):
            raise
        raise SchemaError(f"cannot {purpose}: {reason_of(exc.__cause__)}; {remedy}") from exc


def move_to(config: TableConfig, dsn: str, revision: str, *, is_down: bool = False) -> None:
    """Does what `alembic upgrade` or `alembic downgrade` does, on an event loop of its own.

    Raises:
        SchemaError: It cannot be done; says why and what to do.
    """
    move = command.downgrade if is_down else command.upgrade
    _run_command(config, lambda alembic: move(alembic, revision), dsn)


def offline_sql(config: TableConfig, start: str, end: str) -> str:
    """The SQL that takes the tables from one revision to another, as `alembic --sql` writes it.

    Args:
        config: The tables.
        start: "base", "0001"; the revision that the tables have.
        end: "head", "base", "0001"; an earlier one than start downgrades.

    Raises:
        SchemaError: There is no such way.
    """
    versions = {"base": 0, "head": LATEST_VERSION}
    try:
        first, last = (versions[name] if name in versions else int(name) for name in (start, end))
    except ValueError as exc:
        raise SchemaError(
            f"there is no revision {exc.args[0].rpartition(' ')[2]}; {_REVISIONS}"
        ) from None
    move = command.upgrade if first <= last else command.downgrade
    buffer = io.StringIO()
    _run_command(config, lambda alembic: move(alembic, f"{start}:{end}", sql=True), buffer=buffer)
    return buffer.getvalue()


async def current_revision(database: Database, config: TableConfig) -> str | None:
    """The revision that the version table records; None where it records none.

    Raises:
        StorageError: PostgreSQL could not be reached.
    """

    def read(connection: sa.Connection) -> str | None:
        opts = {"fn": None, **_version_table(config)}
        return MigrationContext.configure(connection, opts=opts).get_current_revision()

    purpose = f"read the version of table {config.qualified_name}"
    return await database.transact(lambda connection: connection.run_sync(read), purpose)


def _run_command(
    config: TableConfig,
    work: Callable[[Config], None],
    dsn: str | None = None,
    buffer: TextIO | None = None,
) -> None:
    options = {"dsn": dsn, **asdict(config)}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    alembic = Config(output_buffer=buffer, cmd_opts=Namespace(x=given))
    alembic.set_main_option("script_location", script_location().replace("%", "%%"))
    try:
        work(alembic)
    except CommandError as exc:
        is_about_revisions = isinstance(exc.__cause__, RevisionError)
        raise SchemaError(f"{exc}; {_REVISIONS}" if is_about_revisions else str(exc)) from exc
    except AssertionError as exc:  # Alembic's, of an empty name and the like
        raise SchemaError(f"there is no such revision; {_REVISIONS}") from exc


def _lock(connection: sa.Connection, config: TableConfig, timings: Timings) -> None:
    # Without the schema, which one process may name and the next leave to the search_path.
    key = sa.func.hashtextextended(f"taskiq_sa_pg {config.table_name}", 0)
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
    # ALTER TABLE waits until nobody reads or writes the table. After the other lock, which may
    # take longer.
    limit = f"{timings.lock * 1000:.0f}ms"
    connection.execute(sa.select(sa.func.set_config("lock_timeout", limit, True)))


def _version_table(config: TableConfig) -> dict[str, Any]:
    return {
        "version_table": quoted_name(config.version_table_name, quote=True),
        "version_table_schema": config.schema and quoted_name(config.schema, quote=True),
    }


def environment_config() -> TableConfig:
    """The configuration that an Alembic command asks for.

    Each option comes from `-x name=value`, the environment variable TASKIQ_SA_PG_NAME, or the
    .ini section, in this order. An empty variable counts as none.

    Raises:
        CommandError: An option or a value that does not exist.
    """
    # Cut at the colon: a DSN without `dsn=` before it may hold a password.
    passed = {name.partition(":")[0] for name in context.get_x_argument(as_dictionary=True)}
    unknown = passed - {"dsn", *_OPTIONS}
    if unknown:
        raise CommandError(
            f"unknown option -x {', '.join(sorted(unknown))}; the options are "
            f"{', '.join(('dsn', *_OPTIONS))}"
        )
    given = {name: value for name in _OPTIONS if (value := _environment_option(name)) is not None}
    try:
        return TableConfig(**given)  # type: ignore[arg-type]  # checked by TableConfig itself
    except ConfigurationError as exc:
        raise CommandError(str(exc)) from exc


def environment_options() -> dict[str, Any]:
    """environment_config() as the arguments of schema.upgrade() and schema.downgrade()."""
    return asdict(environment_config())


def _environment_option(name: str) -> str | None:
    passed: dict[str, str] = context.get_x_argument(as_dictionary=True)
    if name in passed:
        return passed[name]
    variable = os.environ.get(_ENVIRONMENT_PREFIX + name.upper())
    return variable or context.config.get_main_option(name)


def run_environment() -> None:
    """What env.py does: runs an Alembic command's migrations, online or offline.

    Raises:
        CommandError: The command cannot be carried out; Alembic prints its text alone.
    """
    config = environment_config()
    if context.is_offline_mode():
        if "\t" in config.qualified_name:
            raise CommandError("--sql cannot write a name with a tab: Alembic makes spaces of it")
        # asyncpg's dialect and named parameters: no percent sign in a name is doubled.
        context.configure(
            dialect_name="postgresql+asyncpg",
            dialect_opts={"paramstyle": "named"},
            literal_binds=True,
            **_version_table(config),
        )
        with context.begin_transaction():
            context.run_migrations()
        return
    try:
        asyncio.run(_run_online(config))
    except TaskiqSaPgError as exc:
        raise CommandError(str(exc)) from exc


async def _run_online(config: TableConfig) -> None:
    dsn = _environment_option("dsn") or context.config.get_main_option("sqlalchemy.url")
    if not dsn:
        raise CommandError("which database? Set TASKIQ_SA_PG_DSN, or pass -x dsn=postgresql://...")
    database = Database(dsn, engine_kwargs={"poolclass": sa.NullPool})
    await database.open()
    try:
        # A command says at once what is wrong.
        await _in_transaction(database, config, _run_on, timeout=0)
    finally:
        await database.close()


def _run_on(connection: sa.Connection, config: TableConfig) -> None:
    _lock(connection, config, DEFAULT_TIMINGS)
    # Alembic calls the schema that is first in the search_path None.
    is_default = config.schema == connection.dialect.default_schema_name
    schema = None if is_default else config.schema

    def is_ours(name: str | None, kind: str, _parents: Any) -> bool:
        if kind == "schema":
            return name == schema
        return kind != "table" or name in config.table_names

    context.configure(
        connection=connection,
        target_metadata=build_models(**asdict(config)).metadata,
        include_schemas=config.schema is not None,
        include_name=is_ours,
        **_version_table(config),
    )
    with context.begin_transaction():
        context.run_migrations()


def _remedies(config: TableConfig) -> dict[str, str]:
    """What a person can do about an SQLSTATE."""
    schema = config.schema or "the first one of the search_path"
    return {
        "42P07": f"a table or index of {config.qualified_name} exists already and was left "
        "untouched. If it belongs to something else, choose another table_name; if it was made "
        "from these models in another way, record that with "
        f"`{alembic_command(config, 'stamp head')}`",
        "55P03": "other transactions hold locks on the table: let them end (pg_stat_activity lists "
        "them), and try again",
        "3D000": "create the database first (`createdb NAME`), or correct the dsn",
        "3F000": f"create the schema first (CREATE SCHEMA); the tables go into {schema}",
        "42501": "run this as the owner of the tables or, to make them, as a role that may: "
        f"GRANT USAGE, CREATE ON SCHEMA ... TO ... (schema: {schema})",
        "28P01": "correct user and password in the dsn",
    }
