"""The commands that show what is stored."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.cli.output import JsonOption, repr_of, say, say_json, say_lines, say_table
from taskiq_sa_pg.cli.since import parse_since
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import ResultDecodeError, ResultIsMissingError
from taskiq_sa_pg.schema import select_sizes


async def show(
    target: Target,
    task_id: Annotated[str, typer.Argument(help="The task.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave values undecoded: nothing is unpickled.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Shows a result with its progress and its traceback. Reading a pickle runs what it says.

    The exit status is 1 if something of it cannot be decoded.
    """
    parameters = {"task_ids": [target.config.to_column_task_id(task_id)]}
    purpose = f"read the result of task {task_id!r}"
    async with target.runtime() as runtime:
        results, details, progress = [
            await runtime.database.fetch(select(target.models), parameters, purpose)
            for select in (sql.select_results, sql.select_details, sql.select_progress)
        ]
    if not (results and details) and not progress:
        raise ResultIsMissingError(task_id, target.config.qualified_name)
    shown: dict[str, Any] = {"task_id": task_id}
    if results and details:
        stored, more = sql.StoredResult._make(results[0]), sql.Details._make(details[0])
        shown |= _shown_result(target, stored, more, is_raw=raw)
    if progress:
        stored_progress = sql.StoredProgress._make(progress[0])
        shown["progress"] = _shown_progress(target, stored_progress, is_raw=raw)
    if json:
        say_json(shown)
    else:
        _say_fields(shown)
    if "undecodable" in {*shown, *shown.get("progress", ())}:
        raise typer.Exit(1)


def _shown_result(
    target: Target, stored: sql.StoredResult, details: sql.Details, *, is_raw: bool
) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "outcome": _outcome(stored.is_err),
        "task_name": details.task_name,
        "args": None if details.args is None else json.loads(details.args),
        "kwargs": None if details.kwargs is None else json.loads(details.kwargs),
        "worker": details.worker,
        "queued_at": details.queued_at,
        "started_at": details.started_at,
        "finished_at": details.finished_at,
        "execution_time": stored.execution_time,
        "attempt": details.attempt,
    }
    if is_raw:
        shown |= {"return_value": stored.return_value, "error": stored.error}
    else:
        try:
            result = target.codec.decode_result(stored, with_logs=True)
        except ResultDecodeError as exc:
            shown["undecodable"] = str(exc)
        else:
            shown |= {"return_value": result.return_value, "error": result.error}
            shown["labels"] = result.labels
    return shown | {"error_type": stored.error_type, "traceback": details.traceback}


def _shown_progress(target: Target, stored: sql.StoredProgress, *, is_raw: bool) -> dict[str, Any]:
    if is_raw:
        return {"state": stored.state, "meta": stored.meta}
    try:
        progress = target.codec.decode_progress(stored)
    except ResultDecodeError as exc:
        return {"state": stored.state, "undecodable": str(exc)}
    return {"state": progress.state, "meta": progress.meta}


def _say_fields(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if value is None or name == "traceback" or (name == "labels" and not value):
            continue
        say(f"{name + ':':<16}{value if isinstance(value, str) else _to_text(name, value)}")
    # Last, so that no line of it can be taken for a field.
    if traceback := fields.get("traceback"):
        say_lines(f"\n{traceback.rstrip()}")


def _to_text(name: str, value: Any) -> str:
    match value:
        case datetime():
            return value.isoformat(sep=" ", timespec="seconds")
        case float() if name == "execution_time":
            return f"{value:.3f} s"
        case _:
            return repr_of(value)


async def list_results(
    target: Target,
    errors: Annotated[bool, typer.Option("--errors", help="Failures only.")] = False,
    since: Annotated[
        str | None,
        typer.Option(help="Finished in the last 30s, 15m, 2h, 7d or 1w, or since an ISO date."),
    ] = None,
    task_name: Annotated[
        str | None,
        typer.Option(help="Results of this task only, where the column task_name is filled."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    json: JsonOption = False,
) -> None:
    """Lists results, the latest first."""
    statement = sql.select_list(
        target.models,
        is_err=True if errors else None,
        since=None if since is None else parse_since(since),
        task_name=task_name,
        limit=limit,
    )
    async with target.runtime() as runtime:
        rows = await runtime.database.fetch(statement, {}, "list results")
    listed = [sql.Listed._make(row) for row in rows]
    if json:
        say_json([row._asdict() | {"outcome": _outcome(row.is_err)} for row in listed])
        return
    say_table(
        ["finished at", "outcome", "seconds", "task", "task id"],
        [
            [
                row.finished_at.isoformat(sep=" ", timespec="seconds"),
                row.error_type or _outcome(row.is_err),
                f"{row.execution_time:.3f}",
                row.task_name or "",
                str(row.task_id),
            ]
            for row in listed
        ],
    )


async def stats(target: Target, json: JsonOption = False) -> None:
    """Counts results by outcome, and says how large and how old the tables are."""
    async with target.runtime() as runtime:
        fetch, models = runtime.database.fetch, target.models
        [row] = await fetch(sql.select_counts(models), {}, "count results")
        [[progress]] = await fetch(sql.count_progress(models), {}, "count progress")
        sizes = await fetch(select_sizes(target.config), {}, "measure the tables")
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
    _say_fields(shown)
    for name, size in sizes:
        say(f"{'size:':<16}{size / 1024:,.0f} kB  {name}")


def _outcome(is_err: bool) -> str:
    return "failure" if is_err else "success"
