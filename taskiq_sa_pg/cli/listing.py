"""The commands that show a result, and counts of all."""

from typing import Annotated, Any

import typer

from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.cli.output import JsonOption, say, say_json
from taskiq_sa_pg.cli.tables import say_fields
from taskiq_sa_pg.cli.target import Target, TaskId
from taskiq_sa_pg.exceptions import ResultDecodeError, ResultIsMissingError
from taskiq_sa_pg.results import TaskDetails
from taskiq_sa_pg.schema import has_citus, select_sizes


async def show(
    target: Target,
    task_id: TaskId,
    raw: Annotated[
        bool, typer.Option("--raw", help="Do not decode values: nothing is unpickled.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show a result, its progress and its traceback.

    Decoding a pickle runs code that its writer has chosen; --raw decodes nothing. The exit status
    is 1 if a value cannot be decoded.
    """
    column_id = target.config.to_column_task_id(task_id)
    parameters, purpose = {"task_ids": [column_id]}, f"read the result of task {task_id!r}"
    details = None
    async with target.runtime(codec=target.codec) as runtime:
        progress = await runtime.reader.read_progress(column_id)
        try:
            details = await runtime.finding.read_details(column_id, with_result=not raw)
        except ResultIsMissingError:
            if progress is None:
                raise
        select_raw = sql.select_results(target.models)
        stored = await runtime.database.fetch(select_raw, parameters, purpose) if raw else ()
    shown: dict[str, Any] = {"task_id": task_id}
    if details is not None:
        values = [sql.StoredResult._make(row) for row in stored]
        shown |= _shown_result(details, values[0] if values else None)
    if progress is not None:
        shown["progress"] = _shown_progress(target, progress, is_raw=raw)
    if json:
        say_json(shown)
    else:
        say_fields(shown)
    if "undecodable" in {*shown, *shown.get("progress", ())}:
        raise typer.Exit(1)


def _shown_result(details: TaskDetails, raw: sql.StoredResult | None) -> dict[str, Any]:
    record = details.record
    names = ("worker", "queued_at", "started_at", "finished_at", "execution_time", "attempt")
    shown: dict[str, Any] = {
        "outcome": record.outcome,
        "task_name": record.task_name,
        "args": details.args,
        "kwargs": details.kwargs,
        **{name: getattr(record, name) for name in (*names, "expires_at", "labels")},
    }
    if details.undecodable is not None:
        shown["undecodable"] = details.undecodable
    elif (source := details.result or raw) is not None:
        shown |= {"return_value": source.return_value, "error": source.error}
    if details.result is not None:
        shown["labels"] = details.result.labels
    return shown | {"error_type": record.error_type, "traceback": details.traceback}


def _shown_progress(target: Target, stored: sql.StoredProgress, *, is_raw: bool) -> dict[str, Any]:
    if is_raw:
        return {"state": stored.state, "meta": stored.meta}
    try:
        progress = target.codec.decode_progress(stored)
    except ResultDecodeError as exc:
        return {"state": stored.state, "undecodable": str(exc)}
    return {"state": progress.state, "meta": progress.meta}


async def stats(target: Target, json: JsonOption = False) -> None:
    """Show counts of results and sizes of the tables.

    The table also has the times of the oldest and the newest result.
    """
    async with target.runtime() as runtime:
        fetch, models = runtime.database.fetch, target.models
        [row] = await fetch(sql.select_counts(models), {}, "count results")
        [[progress]] = await fetch(sql.count_progress(models), {}, "count progress")
        purpose = "measure the tables"
        [[is_citus]] = await fetch(has_citus(), {}, purpose)
        sizes = await fetch(select_sizes(target.config, is_citus=is_citus), {}, purpose)
    counts = sql.Counts._make(row)
    shown = {
        "results": counts.results,
        "successes": counts.results - counts.failures,
        "failures": counts.failures,
        "expired": counts.expired,
        "progress": progress,
        "oldest": counts.oldest,
        "newest": counts.newest,
    }
    if json:
        say_json(shown | {"bytes": dict(map(tuple, sizes))})
        return
    say_fields(shown)
    for name, size in sizes:
        say(f"{'size:':<16}{size / 1024:,.0f} kB  {name}")
