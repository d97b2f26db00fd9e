"""The command that deletes expired results."""

from dataclasses import asdict
from typing import Annotated

import typer

from taskiq_sa_pg.cli.output import MAX_INT, JsonOption, plural, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.codec import check_seconds


async def prune(
    target: Target,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count the rows that would be deleted.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MAX_INT, help="Maximum number of rows to delete.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds after which no further transaction begins.")
    ] = None,
    progress_ttl: Annotated[
        float | None,
        typer.Option(
            envvar="TASKIQ_SA_PG_PROGRESS_TTL",
            help="Also delete progress and status of tasks without a result, if they have not "
            "changed for this number of seconds.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Delete expired results.

    Their progress and status are deleted, too. A transaction deletes at most 500 rows. You can
    interrupt the command and run it again.
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
        f"{plural(pruned.results, 'expired result')}, {pruned.progress:,} stale progress and "
        f"{plural(pruned.statuses, 'stale status row')} {would}"
    )
    if not pruned.is_complete:
        say("there may be more: run the command again")
