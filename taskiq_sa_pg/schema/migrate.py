"""Runs the schema's steps, in an Alembic command or at startup.

The only user of Alembic. Each results table has its own version tables, one for each family: with
a shared one, Alembic would assume that the second results table exists.
"""

import asyncio
import io
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
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

from taskiq_sa_pg.database import READ_ONLY, Database, reason_of
from taskiq_sa_pg.exceptions import ConfigurationError, SchemaError, StorageError, TaskiqSaPgError
from taskiq_sa_pg.models import TableConfig, quoted
from taskiq_sa_pg.schema.check import (
    alembic_command,
    is_old_table,
    located,
    old_table_remedy,
    upgrade_commands,
)
from taskiq_sa_pg.schema.families import RESULTS, Family, chosen_families
from taskiq_sa_pg.schema.quiet import quiet_alembic
from taskiq_sa_pg.schema.steps import LATEST_VERSION
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

logger = logging.getLogger(__name__)

_OPTIONS: Final = tuple(option.name for option in fields(TableConfig))

_DUPLICATE_TABLE: Final = "42P07"

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
    family: Family = RESULTS,
) -> None:
    """Upgrades the tables of a family to the latest version; safe in several processes at once.

    Missing steps run in one transaction under an advisory lock. They are recorded in the version
    table as `alembic upgrade head` does. If PostgreSQL cannot be reached, it retries for `timeout`
    seconds; None is the default.
    """
    config = located(database, config)

    def upgrade(connection: sa.Connection) -> None:
        # The configuration is translated already, and Alembic's inspections never are.
        connection = connection.execution_options(schema_translate_map=None)
        with quiet_alembic():
            _upgrade(connection, config, family)

    await _run_locked(database, config, family, upgrade, timeout=timeout, timings=timings)


def _upgrade(connection: sa.Connection, config: TableConfig, family: Family) -> None:
    # Not through alembic.command: its `op` and `context` are global, so two backends that start
    # at the same time would run each other's migrations.
    migration_context = MigrationContext.configure(connection, opts=_version_table(config, family))
    current = max(map(int, migration_context.get_current_heads()), default=0)
    if restored := _restore(migration_context, config, family):
        logger.warning("%s", restored)
    pending = range(current + 1, LATEST_VERSION + 1)
    for version in pending:
        step = family.step(version)
        step.upgrade(Operations(migration_context), config, family.table_names(config))
    if pending:
        latest = f"{LATEST_VERSION:04}"
        migration_context.stamp(ScriptDirectory(script_location()), latest)
        logger.info("table %s: upgraded to version %s", family.place(config), latest)


def _restore(migration_context: MigrationContext, config: TableConfig, family: Family) -> str:
    """Creates tables again that the version table records and that are missing.

    Returns:
        The message about it; empty if nothing was missing.
    """
    connection, recorded = migration_context.connection, migration_context.get_current_heads()
    version = next((v for v in range(1, LATEST_VERSION + 1) if f"{v:04}" in recorded), 0)
    if connection is None or not version:
        return ""
    inspector = sa.inspect(connection)
    names = family.table_names(config)
    missing = [n for n in names if not inspector.has_table(n, schema=config.schema)]
    if not missing:
        return ""
    for each in range(1, version + 1):
        family.step(each).upgrade(Operations(migration_context), config, missing)
    return (
        f"{family.version_table_name(config)} records version {version:04}, but tables were "
        f"missing and were created again, empty: {', '.join(missing)}"
    )


async def _run_locked(
    database: Database,
    config: TableConfig,
    family: Family,
    work: Callable[[sa.Connection], None],
    *,
    timeout: float | None,
    timings: Timings = DEFAULT_TIMINGS,
) -> None:
    def run(connection: sa.Connection) -> None:
        # One for all families. Without the schema: one process may name it, and another leave it
        # to the search_path.
        key = sa.func.hashtextextended(f"taskiq_sa_pg {config.table_name}", 0)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
        # ALTER TABLE waits for all readers and writers of the table. Set after the advisory lock,
        # which may take longer.
        limit = f"{timings.lock * 1000:.0f}ms"
        connection.execute(sa.select(sa.func.set_config("lock_timeout", limit, True)))
        work(connection)

    purpose = f"migrate table {family.place(config)}"
    try:
        # Without a limit: a step may build an index or wait for another process.
        await database.transact(
            lambda connection: connection.run_sync(run),
            purpose,
            is_limited=False,
            retry_timeout=timeout,
        )
    except StorageError as exc:
        remedy = _remedies(config, family).get(exc.sqlstate or "")
        is_in_the_way = exc.sqlstate == _DUPLICATE_TABLE and family is RESULTS
        if is_in_the_way and await is_old_table(database, config, timeout):
            remedy = old_table_remedy(config)
        cause = exc.__cause__
        if remedy is None or not isinstance(cause, Exception):
            raise
        reason = reason_of(cause) + database.name_server(cause)
        raise SchemaError(f"cannot {purpose}: {reason}; {remedy}") from exc


def move_to(
    config: TableConfig,
    revision: str,
    *,
    is_down: bool,
    dsn: str | None = None,
    buffer: TextIO | None = None,
    family: Family = RESULTS,
) -> None:
    """Runs `alembic upgrade` or `alembic downgrade` on a new event loop.

    With a buffer, it writes the SQL there and does not connect.

    Raises:
        SchemaError: It failed; names the reason and the remedy.
        ConfigurationError: The revision does not exist.
    """
    options = {"dsn": dsn, "queue": family.choice, **asdict(config)}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    move = command.downgrade if is_down else command.upgrade
    # As from Alembic's command line.
    chosen = Namespace(x=given, cmd=(move,))
    alembic = Config(output_buffer=buffer, stdout=sys.stdout, cmd_opts=chosen)
    alembic.set_main_option("script_location", script_location().replace("%", "%%"))
    try:
        move(alembic, revision, sql=buffer is not None)
    except CommandError as exc:
        if isinstance(exc.__cause__, RevisionError):
            raise ConfigurationError(f"{exc}; {_REVISIONS}") from exc
        raise SchemaError(str(exc)) from exc
    except AssertionError as exc:  # Alembic's, of an empty name and the like
        raise ConfigurationError(f"there is no revision {revision!r}; {_REVISIONS}") from exc


def offline_sql(config: TableConfig, start: str, end: str, family: Family = RESULTS) -> str:
    """The SQL that migrates tables from one revision to another, as from `alembic --sql`.

    Revisions are "base", "0001" and "head". If the end is before the start, the SQL downgrades; if
    both are the same, it is empty.

    Raises:
        ConfigurationError: A revision does not exist.
    """
    versions = {"base": 0, "head": LATEST_VERSION}
    versions |= {f"{version:04}": version for version in range(1, LATEST_VERSION + 1)}
    for name in (start, end):
        if name not in versions:
            raise ConfigurationError(f"there is no revision {name!r}; {_REVISIONS}")
    first, last = versions[start], versions[end]
    if first == last:
        return ""
    buffer = io.StringIO()
    move_to(config, f"{start}:{end}", is_down=last < first, buffer=buffer, family=family)
    return buffer.getvalue()


async def current_revision(
    database: Database, config: TableConfig, family: Family = RESULTS
) -> str | None:
    """The revision in the family's version table; None if there is none."""

    def read(connection: sa.Connection) -> str | None:
        opts = _version_table(config, family)
        migration_context = MigrationContext.configure(connection, opts=opts)
        return migration_context.get_current_revision()

    purpose = f"read the version of table {family.place(config)}"
    return await database.transact(lambda connection: connection.run_sync(read), purpose)


def _version_table(config: TableConfig, family: Family) -> dict[str, Any]:
    return {
        "version_table": quoted(family.version_table_name(config)),
        "version_table_schema": config.schema and quoted(config.schema),
    }


def _chosen_tables() -> tuple[TableConfig, tuple[Family, ...]]:
    """The tables and families of an Alembic command.

    Each option comes from `-x name=value`, the environment variable TASKIQ_SA_PG_NAME, or the
    .ini section, in this order. An empty variable is ignored.

    Raises:
        CommandError: An unknown option or value.
    """
    names = ("dsn", *_OPTIONS, "queue")
    # Cut at the colon: a DSN without `dsn=` may hold a password.
    passed = {name.partition(":")[0] for name in context.get_x_argument(as_dictionary=True)}
    unknown = passed - {*names}
    if unknown:
        raise CommandError(
            f"unknown option -x {', '.join(sorted(unknown))}; the options are {', '.join(names)}"
        )
    given = {name: value for name in _OPTIONS if (value := _environment_option(name)) is not None}
    try:
        config = TableConfig(**given)  # type: ignore[arg-type]  # checked by TableConfig itself
        return config, chosen_families(_environment_option("queue") or "")
    except ConfigurationError as exc:
        raise CommandError(str(exc)) from exc


def _environment_option(name: str) -> str | None:
    passed: dict[str, str] = context.get_x_argument(as_dictionary=True)
    if name in passed:
        return passed[name]
    variable = os.environ.get(f"TASKIQ_SA_PG_{name.upper()}")
    return variable or context.config.get_main_option(name)


def run_environment() -> None:
    """Runs an Alembic command's migrations, online or offline; called by env.py.

    The option `queue` selects the results' tables, the broker's, or both in this order. A
    revision's upgrade() and downgrade() receive the family and the configuration.

    Raises:
        CommandError: The command failed; Alembic prints only its text.
    """
    config, families = _chosen_tables()
    if context.is_offline_mode():
        for family in families:
            _run_offline(config, family)
        return
    try:
        asyncio.run(_run_online(config, families))
    except TaskiqSaPgError as exc:
        raise CommandError(str(exc)) from exc


def _run_offline(config: TableConfig, family: Family) -> None:
    if "\t" in config.qualified_name:
        raise CommandError(
            "--sql does not support a name with a tab: Alembic replaces tabs with spaces"
        )
    # With asyncpg's dialect and named parameters, percent signs in a name are not doubled.
    context.configure(
        dialect_name="postgresql+asyncpg",
        dialect_opts={"paramstyle": "named"},
        literal_binds=True,
        **_version_table(config, family),
    )
    with context.begin_transaction():
        context.run_migrations(config=config, family=family)


async def _run_online(config: TableConfig, families: tuple[Family, ...]) -> None:
    dsn = _environment_option("dsn") or context.config.get_main_option("sqlalchemy.url")
    if not dsn:
        raise CommandError("which database? Set TASKIQ_SA_PG_DSN, or pass -x dsn=postgresql://...")
    database = Database(dsn, engine_kwargs={"poolclass": sa.NullPool})
    await database.open()
    try:
        for family in families:
            if len(families) > 1 and _command() is command.current:
                context.config.print_stdout("%s:", family.version_table_name(config))
            run = partial(_run_family, config=config, family=family)
            # A command reports errors at once.
            await _run_locked(database, config, family, run, timeout=0)
    finally:
        await database.close()


def _run_family(connection: sa.Connection, config: TableConfig, family: Family) -> None:
    # For Alembic, the first schema of the search_path is None.
    is_default = config.schema == connection.dialect.default_schema_name
    schema = None if is_default else config.schema

    def is_ours(name: str | None, kind: str, _parents: Any) -> bool:
        if kind == "schema":
            return name == schema
        return kind != "table" or name in family.table_names(config)

    context.configure(
        connection=connection,
        target_metadata=family.metadata(config),
        include_schemas=config.schema is not None,
        include_name=is_ours,
        **_version_table(config, family),
    )
    is_upgrade = _command() is command.upgrade
    with context.begin_transaction():
        restored = _restore(context.get_context(), config, family) if is_upgrade else ""
        context.run_migrations(config=config, family=family)
    if restored:
        context.config.print_stdout("%s", restored)


def _command() -> Any:
    """Alembic's command function; None if Alembic runs without a command line."""
    run, *_ = getattr(context.config.cmd_opts, "cmd", (None,))
    return run


def _remedies(config: TableConfig, family: Family) -> dict[str, str]:
    """The remedies by SQLSTATE."""
    alone = None if family is RESULTS else family.choice
    schema = config.schema or "the first one of the search_path"
    return {
        _DUPLICATE_TABLE: f"a table or index of {family.place(config)} exists already and was "
        "not changed. If it belongs to another program, choose another table_name; if it was "
        "created from these models in another way, record that with "
        f"`{alembic_command(config, 'stamp', 'head', queue=alone)}`",
        "42P01": f"create the missing tables first with {upgrade_commands(config, family)}",
        "55P03": "other transactions hold locks on the table: wait until they end "
        "(pg_stat_activity lists them), and run it again",
        READ_ONLY: "the server is a read replica (a hot standby), or was made read-only. Do this "
        "on the primary, from which replicas copy the tables, and do not set run_migrations=True "
        "in processes that only read",
        "3D000": "create the database first (`createdb NAME`), or correct its name in the dsn",
        "3F000": f"create the schema first (CREATE SCHEMA); the tables go into {schema}",
        "42501": "run this as the owner of the tables or, to create them, as a role with "
        f"GRANT USAGE, CREATE ON SCHEMA ... TO ... (schema: {schema})",
        "28P01": "correct the user and password in the dsn",
    }
