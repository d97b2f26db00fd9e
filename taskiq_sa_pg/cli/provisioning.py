"""The commands that create, upgrade, downgrade and check the tables."""

import asyncio
import os
from dataclasses import asdict
from typing import Annotated, Final

import sqlalchemy as sa
import typer

from taskiq_sa_pg.cli.output import JsonOption, complain, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import ConfigurationError, SchemaError
from taskiq_sa_pg.models import build_models
from taskiq_sa_pg.results import Runtime
from taskiq_sa_pg.schema import LATEST_VERSION, QUEUE, RESULTS, Family, check_queue, chosen_families
from taskiq_sa_pg.schema import check as check_results
from taskiq_sa_pg.schema.migrate import current_revision, move_to, offline_sql

_VARIABLE: Final = "TASKIQ_SA_PG_QUEUE"

QueueOption = Annotated[
    bool, typer.Option("--queue", help=f"Include the broker's tables. [env var: {_VARIABLE}=true]")
]
QueueOnlyOption = Annotated[
    bool,
    typer.Option("--queue-only", help=f"Only the broker's tables. [env var: {_VARIABLE}=only]"),
]


def upgrade(
    target: Target,
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="Revision: 0001 ... or head.")
    ] = "head",
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
) -> None:
    """Create or upgrade the tables.

    Tables that were dropped are created again, empty. Several processes may run this at once.
    """
    for family in _families(queue, queue_only):
        _move(target, family, revision)


def downgrade(
    target: Target,
    revision: Annotated[
        str,
        typer.Argument(
            metavar="REVISION", help="Revision: 0001 ... or base, which drops the tables."
        ),
    ],
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
) -> None:
    """Downgrade or drop the tables.

    Data that the earlier revision has no place for is lost.
    """
    for family in _families(queue, queue_only):
        _move(target, family, revision, is_down=True)


def current(
    target: Target,
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
    json: JsonOption = False,
) -> None:
    """Show the schema version of the tables.

    The latest version is shown, too.
    """
    families, latest = _families(queue, queue_only), f"{LATEST_VERSION:04}"
    revisions = {family: asyncio.run(_current(target, family)) for family in families}
    if json:
        keys = {RESULTS: "current", QUEUE: "queue"}
        say_json({keys[family]: revisions[family] for family in families} | {"latest": latest})
        return
    for family, revision in revisions.items():
        table = "" if families == (RESULTS,) else f"table {family.place(target.config)}: "
        say(f"{table}{revision or 'none'} (latest: {latest})")


async def check(
    target: Target,
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
    json: JsonOption = False,
) -> None:
    """Check the tables and your role's privileges.

    They are compared with what the backend and the broker need. The exit status is 1 if something
    is missing or does not match.
    """
    families = _families(queue, queue_only)
    wrong = []
    async with target.runtime() as runtime:
        for family in families:
            try:
                await _check(target, runtime, family)
            except SchemaError as exc:
                wrong.append(str(exc))
            else:
                if not json:
                    say(f"table {family.place(target.config)}: OK")
    reason = "; ".join(wrong)
    if json:
        say_json({"is_fit": not wrong, "reason": reason or None})
        raise typer.Exit(1 if wrong else 0)
    if wrong:
        raise SchemaError(reason)


def sql(
    target: Target,
    start: Annotated[
        str, typer.Argument(metavar="START", help="Revision of the tables now.")
    ] = "base",
    end: Annotated[
        str, typer.Argument(metavar="END", help="Target revision; an earlier one downgrades.")
    ] = "head",
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
) -> None:
    """Print the SQL of a migration.

    It leads from one revision to another. No database is needed.
    """
    families = _families(queue, queue_only)
    printed = [offline_sql(target.config, start, end, family) for family in families]
    if not any(printed):
        complain(f"nothing to do: {start} and {end} are the same revision")
        return
    for family, text in zip(families, printed, strict=True):
        if families != (RESULTS,):
            typer.echo(f"-- Tables of the {family.user}\n")
        typer.echo(text, nl=False)


def _families(queue: bool, queue_only: bool) -> tuple[Family, ...]:
    if queue and queue_only:
        raise ConfigurationError("--queue and --queue-only exclude each other: choose one")
    if queue:
        return RESULTS, QUEUE
    if queue_only:
        return (QUEUE,)
    try:
        return chosen_families(os.environ.get(_VARIABLE, ""))
    except ConfigurationError as exc:
        raise ConfigurationError(f"{_VARIABLE}: {exc}") from exc


async def _check(target: Target, runtime: Runtime, family: Family) -> None:
    if family is QUEUE:
        await check_queue(runtime.database, build_models(**asdict(target.config), queue=True))
        return
    # The application's models may omit tables, but our revisions create them all.
    models = target.models if await _has_version(target, runtime) else runtime.settings.models
    await check_results(runtime.database, models)


async def _has_version(target: Target, runtime: Runtime) -> bool:
    """Whether the version table exists. It is not read: workers may lack the privilege."""
    name, schema = target.config.version_table_name, target.config.schema

    def look(connection: sa.Connection) -> bool:
        return sa.inspect(connection).has_table(name, schema=schema)

    return await runtime.database.transact(
        lambda connection: connection.run_sync(look), f"look for table {name}"
    )


async def _current(target: Target, family: Family) -> str | None:
    async with target.runtime() as runtime:
        return await current_revision(runtime.database, target.config, family)


def _move(target: Target, family: Family, revision: str, *, is_down: bool = False) -> None:
    before = asyncio.run(_current(target, family)) or "none"
    move_to(target.config, revision, is_down=is_down, dsn=target.dsn, family=family)
    after = asyncio.run(_current(target, family)) or "none"
    change = f"already at {after}" if before == after else f"{before} -> {after}"
    say(f"table {family.place(target.config)}: {change}")
