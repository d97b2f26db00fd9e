"""The commands that make, change and check the tables."""

import asyncio
import os
from dataclasses import asdict
from typing import Annotated, Final

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
    bool, typer.Option("--queue", help=f"The broker's tables, too. [env var: {_VARIABLE}=true]")
]
QueueOnlyOption = Annotated[
    bool,
    typer.Option("--queue-only", help=f"The broker's tables alone. [env var: {_VARIABLE}=only]"),
]


def upgrade(
    target: Target,
    revision: Annotated[str, typer.Argument(help="0001, head ...")] = "head",
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
) -> None:
    """Makes the tables, or brings them up to date; makes those again that were dropped.

    Any number may run at once.
    """
    for family in _families(queue, queue_only):
        _move(target, family, revision)


def downgrade(
    target: Target,
    revision: Annotated[str, typer.Argument(help="0001 ..., or base, which drops the tables.")],
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
) -> None:
    """Takes the tables back to an earlier revision; what it does not have is lost."""
    for family in _families(queue, queue_only):
        _move(target, family, revision, is_down=True)


def current(
    target: Target,
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
    json: JsonOption = False,
) -> None:
    """Says which revision the tables have, and which is the latest."""
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
    """Compares the tables, and the role's rights on them, with what their users need.

    The exit status is 1 if they are unfit.
    """
    families = _families(queue, queue_only)
    unfit = []
    async with target.runtime() as runtime:
        for family in families:
            try:
                await _check(runtime, family)
            except SchemaError as exc:
                unfit.append(str(exc))
            else:
                if not json:
                    say(f"table {family.place(target.config)} is as it should be")
    reason = "; ".join(unfit)
    if json:
        say_json({"is_fit": not unfit, "reason": reason or None})
        raise typer.Exit(1 if unfit else 0)
    if unfit:
        raise SchemaError(reason)


def sql(
    target: Target,
    start: Annotated[str, typer.Argument(help="The revision that the tables have.")] = "base",
    end: Annotated[str, typer.Argument(help="Where to; an earlier one downgrades.")] = "head",
    queue: QueueOption = False,
    queue_only: QueueOnlyOption = False,
) -> None:
    """Prints the SQL that leads from one revision to another; connects to nothing."""
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
        raise ConfigurationError("--queue and --queue-only exclude each other: pass one of them")
    if queue:
        return RESULTS, QUEUE
    if queue_only:
        return (QUEUE,)
    try:
        return chosen_families(os.environ.get(_VARIABLE, ""))
    except ConfigurationError as exc:
        raise ConfigurationError(f"{_VARIABLE}: {exc}") from exc


async def _check(runtime: Runtime, family: Family) -> None:
    models = runtime.settings.models
    if family is RESULTS:
        await check_results(runtime.database, models)
    else:
        await check_queue(runtime.database, build_models(**asdict(models.config), queue=True))


async def _current(target: Target, family: Family) -> str | None:
    async with target.runtime() as runtime:
        return await current_revision(runtime.database, target.config, family)


def _move(target: Target, family: Family, revision: str, *, is_down: bool = False) -> None:
    before = asyncio.run(_current(target, family)) or "none"
    move_to(target.config, revision, is_down=is_down, dsn=target.dsn, family=family)
    after = asyncio.run(_current(target, family)) or "none"
    change = f"is at {after}" if before == after else f"{before} -> {after}"
    say(f"table {family.place(target.config)}: {change}")
