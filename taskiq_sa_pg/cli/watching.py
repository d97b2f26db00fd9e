"""The command that shows tasks at work."""

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isnan
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.cli.output import JsonOption, console, printable, repr_of, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import select_progress, select_results

# Takes a task, what has become of it, that in words, and as fields of a JSON object.
_Tell = Callable[[str, str, str, Mapping[str, Any]], None]


async def watch(
    target: Target,
    task_ids: Annotated[list[str], typer.Argument(help="The tasks.")],
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait; else for as long as it takes.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Shows the progress of tasks until all have ended; the exit status is 1 if one has failed.

    Metadata with `percent`, or with `current` and `total`, fills a bar.
    """
    for task_id in task_ids:
        target.config.to_column_task_id(task_id)
    view: AbstractContextManager[_Tell] = (
        nullcontext(_say_json) if json else _bars() if sys.stdout.isatty() else nullcontext(_say)
    )
    # Not the backend's check of the tables: nothing is written, which a column of the application's
    # own that is NOT NULL would be in the way of.
    async with target.runtime() as runtime:
        for select in (select_results, select_progress):
            await runtime.database.fetch(select(target.models), {"task_ids": []}, "watch tasks")
    try:
        async with target.backend(check_schema="off") as backend:
            with view as tell:
                async with asyncio.TaskGroup() as group:
                    watching = [
                        group.create_task(_watch(backend, task_id, timeout, tell))
                        for task_id in dict.fromkeys(task_ids)
                    ]
    except ExceptionGroup as exc:
        # One is told, such as a closed pipe, as with the other commands.
        raise exc.exceptions[0] from None
    if not all(each.result() for each in watching):
        raise typer.Exit(1)


async def _watch(
    backend: SQLAlchemyResultBackend[Any], task_id: str, timeout: float | None, tell: _Tell
) -> bool:
    """Whether the task has succeeded."""
    try:
        async for progress in backend.watch_progress(task_id, timeout):
            # The name: "STARTED", not "TaskState.STARTED".
            state = str(getattr(progress.state, "value", progress.state))
            fields = {"state": state, "meta": progress.meta}
            tell(task_id, "progress", f"{state} {repr_of(progress.meta)}", fields)
        result = await backend.get_result(task_id)
    except TaskiqResultTimeoutError:
        reason = "not finished in time"
        tell(task_id, "timeout", reason, {"reason": reason})
    except TaskiqSaPgError as exc:
        tell(task_id, "trouble", str(exc), {"reason": str(exc)})
    else:
        value, error, seconds = result.return_value, result.error, f"{result.execution_time:.3f} s"
        fields = {"return_value": value, "error": error}
        if result.is_err:
            tell(task_id, "failure", f"failure after {seconds}: {repr_of(error)}", fields)
        else:
            tell(task_id, "success", f"success in {seconds}: {repr_of(value)}", fields)
        return not result.is_err
    return False


def _say(task_id: str, _event: str, text: str, _fields: Mapping[str, Any]) -> None:
    say(f"{task_id}: {text}")


def _say_json(task_id: str, event: str, _text: str, fields: Mapping[str, Any]) -> None:
    say_json({"task_id": task_id, "event": event, **fields})


@contextmanager
def _bars() -> Iterator[_Tell]:
    """A bar for each task, live."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console()) as progress:

        def show(task_id: str, event: str, text: str, fields: Mapping[str, Any]) -> None:
            if task_id not in bars:
                bars[task_id] = progress.add_task(printable(task_id), total=None, state="")
            fraction = 1.0 if event == "success" else fraction_of(fields.get("meta"))
            state = text if fraction is None else fields.get("state", text)
            total = None if fraction is None else 1.0
            progress.update(bars[task_id], total=total, completed=fraction, state=printable(state))

        yield show


def fraction_of(meta: Any) -> float | None:
    """How far a task is, from 0 to 1, of `percent` or of `current` and `total`; None unknown."""
    match meta:
        case {"percent": int() | float() as percent}:
            fraction = percent / 100
        case {"current": int() | float() as done, "total": int() | float() as total} if total > 0:
            fraction = done / total
        case _:
            return None
    return None if isnan(fraction) else min(max(fraction, 0.0), 1.0)
