"""The command that deletes what has expired."""

from dataclasses import asdict
from typing import Annotated

import typer
from sqlalchemy import Table

from taskiq_sa_pg.cli.output import JsonOption, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.layout import Layout
from taskiq_sa_pg.prune_statements import count_expired, count_stale
from taskiq_sa_pg.pruning import Pruned, Pruning
from taskiq_sa_pg.retention import check_seconds
from taskiq_sa_pg.schema import find_features
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.telemetry import Telemetry


async def prune(
    target: Target,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be deleted, and delete nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="How many rows at most.")] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds after which no further 100 rows are deleted.")
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

    In statements of at most 100 rows that nobody has to wait for; it may be interrupted and run
    again.
    """
    check_seconds("--time-budget", time_budget)
    check_seconds("--progress-ttl", progress_ttl)
    layout = Layout(target.models)
    async with target.store() as store:
        layout.expect(await find_features(store, target.models))
        if dry_run:
            pruned = await _count(store, layout, progress_ttl)
        else:
            telemetry = Telemetry(target.config.qualified_name)
            pruning = Pruning(store, layout, progress_ttl, telemetry, is_exclusive=False)
            pruned = await pruning.run(limit, time_budget)
    if json:
        say_json(asdict(pruned))
        return
    would = "would be deleted" if dry_run else "deleted"
    say(
        f"{pruned.results:,} expired results, {pruned.progress:,} stale progress and "
        f"{pruned.statuses:,} stale statuses {would}"
    )
    if not pruned.is_complete:
        say("something may be left: run it again")


async def _count(store: Store, layout: Layout, progress_ttl: float | None) -> Pruned:
    models = layout.models
    [[results]] = await store.fetch(count_expired(models), {}, "count expired results")

    async def count(table: Table | None) -> int:
        if table is None or progress_ttl is None:
            return 0
        statement = count_stale(models, table)
        [[stale]] = await store.fetch(statement, {"seconds": progress_ttl}, "count stale rows")
        return int(stale)

    progress = await count(models.progress_table)
    statuses = await count(models.status_table if layout.features.has_status else None)
    return Pruned(results, progress, statuses, is_complete=True)
