"""The command that deletes what has expired."""

from dataclasses import asdict
from typing import Annotated

import typer

from taskiq_sa_pg.cli.output import JsonOption, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.codec import check_seconds


async def prune(
    target: Target,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be deleted, and delete nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="How many rows at most.")] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds after which no further 500 rows are deleted.")
    ] = None,
    progress_ttl: Annotated[
        float | None,
        typer.Option(
            envvar="TASKIQ_SA_PG_PROGRESS_TTL",
            help="Delete progress and status, too, that have not changed for so many seconds and "
            "whose task has no result.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Deletes results that have expired, with their progress.

    In transactions of at most 500 rows; it may be interrupted and run again.
    """
    check_seconds("--time-budget", time_budget)
    check_seconds("--progress-ttl", progress_ttl)
    async with target.runtime(progress_ttl) as runtime:
        pruner = runtime.pruner
        pruned = await (pruner.count() if dry_run else pruner.run(limit, time_budget))
    if json:
        say_json(asdict(pruned) | {"is_dry_run": dry_run})
        return
    would = "would be deleted" if dry_run else "deleted"
    say(
        f"{pruned.results:,} expired results, {pruned.progress:,} stale progress and "
        f"{pruned.statuses:,} stale statuses {would}"
    )
    if not pruned.is_complete:
        say("something may be left: run it again")
