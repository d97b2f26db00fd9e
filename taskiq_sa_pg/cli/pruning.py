"""The command that deletes what has expired."""

from dataclasses import asdict
from typing import Annotated

import typer

from taskiq_sa_pg.cli.output import JsonOption, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.prune_statements import count_expired, count_stale_progress
from taskiq_sa_pg.pruning import Pruned, Pruning
from taskiq_sa_pg.retention import check_seconds
from taskiq_sa_pg.store import Store


async def prune(
    target: Target,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be deleted, and delete nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="How many rows at most.")] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds after which no further 1,000 rows are deleted.")
    ] = None,
    progress_ttl: Annotated[
        float | None,
        typer.Option(
            envvar="TASKIQ_SA_PG_PROGRESS_TTL",
            help="Delete progress, too, that has not changed for so many seconds and whose task "
            "has no result.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Deletes results that have expired, with their progress.

    In statements of at most 1,000 rows that nobody has to wait for; it may be interrupted and run
    again.
    """
    check_seconds("--time-budget", time_budget)
    check_seconds("--progress-ttl", progress_ttl)
    models = target.models
    async with target.store() as store:
        if dry_run:
            pruned = await _count(store, models, progress_ttl)
        else:
            pruning = Pruning(store, models, progress_ttl, is_exclusive=False)
            pruned = await pruning.run(limit, time_budget)
    if json:
        say_json(asdict(pruned))
        return
    would = "would be deleted" if dry_run else "deleted"
    say(f"{pruned.results:,} expired results and {pruned.progress:,} stale progress {would}")
    if not pruned.is_complete:
        say("something may be left: run it again")


async def _count(store: Store, models: Models, progress_ttl: float | None) -> Pruned:
    [[results]] = await store.fetch(count_expired(models), {}, "count expired results")
    progress = 0
    if progress_ttl is not None:
        [[progress]] = await store.fetch(
            count_stale_progress(models), {"seconds": progress_ttl}, "count stale progress"
        )
    return Pruned(results, progress, is_complete=True)
