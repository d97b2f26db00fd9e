"""The commands that make, change and check the tables."""

import asyncio
from typing import Annotated

import typer

from taskiq_sa_pg.cli.output import JsonOption, complain, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.schema import LATEST_VERSION
from taskiq_sa_pg.schema import check as check_schema
from taskiq_sa_pg.schema.migrate import current_revision, move_to, offline_sql


def upgrade(
    target: Target,
    revision: Annotated[str, typer.Argument(help="0001, head ...")] = "head",
) -> None:
    """Makes the tables, or brings them up to date; makes those again that were dropped.

    Any number may run at once.
    """
    _move(target, revision)


def downgrade(
    target: Target,
    revision: Annotated[str, typer.Argument(help="0001 ..., or base, which drops the tables.")],
) -> None:
    """Takes the tables back to an earlier revision; what it does not have is lost."""
    _move(target, revision, is_down=True)


def current(target: Target, json: JsonOption = False) -> None:
    """Says which revision the tables have, and which is the latest."""
    revision, latest = asyncio.run(_current(target)), f"{LATEST_VERSION:04}"
    if json:
        say_json({"current": revision, "latest": latest})
    else:
        say(f"{revision or 'none'} (latest: {latest})")


async def check(target: Target, json: JsonOption = False) -> None:
    """Compares the tables, and the role's rights on them, with what the backend needs.

    The exit status is 1 if they are unfit.
    """
    unfit = ""
    async with target.runtime() as runtime:
        try:
            await check_schema(runtime.database, target.models)
        except SchemaError as exc:
            unfit = str(exc)
    if json:
        say_json({"is_fit": not unfit, "reason": unfit or None})
        raise typer.Exit(1 if unfit else 0)
    if unfit:
        raise SchemaError(unfit)
    say(f"table {target.config.qualified_name} is as it should be")


def sql(
    target: Target,
    start: Annotated[str, typer.Argument(help="The revision that the tables have.")] = "base",
    end: Annotated[str, typer.Argument(help="Where to; an earlier one downgrades.")] = "head",
) -> None:
    """Prints the SQL that leads from one revision to another; connects to nothing."""
    printed = offline_sql(target.config, start, end)
    typer.echo(printed, nl=False)
    if not printed:
        complain(f"nothing to do: {start} and {end} are the same revision")


async def _current(target: Target) -> str | None:
    async with target.runtime() as runtime:
        return await current_revision(runtime.database, target.config)


def _move(target: Target, revision: str, *, is_down: bool = False) -> None:
    before = asyncio.run(_current(target)) or "none"
    move_to(target.config, revision, is_down=is_down, dsn=target.dsn)
    after = asyncio.run(_current(target)) or "none"
    change = f"is at {after}" if before == after else f"{before} -> {after}"
    say(f"table {target.config.qualified_name}: {change}")
