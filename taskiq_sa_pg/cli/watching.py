"""The command that shows tasks at work."""

import asyncio
import sys
from math import isnan
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.cli.output import JsonOption, console, printable, repr_of, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import select_progress, select_results


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
    view = _JsonLines() if json else _Bars() if sys.stdout.isatty() else _Lines()
    tasks = list(dict.fromkeys(task_ids))
    # Not the backend's check of the tables: nothing is written, which a column of the application's
    # own that is NOT NULL would be in the way of.
    async with target.runtime() as runtime:
        for select in (select_results, select_progress):
            statement = select(runtime.settings.models)
            await runtime.database.fetch(statement, {"task_ids": []}, "watch tasks")
    try:
        async with target.backend(check_schema="off") as backend:
            with view:
                async with asyncio.TaskGroup() as group:
                    watching = [
                        group.create_task(_watch(backend, task_id, timeout, view))
                        for task_id in tasks
                    ]
    except ExceptionGroup as exc:
        # One is told, such as a closed pipe, as with the other commands.
        raise exc.exceptions[0] from None
    if not all(each.result() for each in watching):
        raise typer.Exit(1)


async def _watch(
    backend: SQLAlchemyResultBackend[Any], task_id: str, timeout: float | None, view: "_Lines"
) -> bool:
    """Whether the task has succeeded."""
    try:
        async for progress in backend.watch_progress(task_id, timeout):
            view.tell_progress(task_id, progress)
        result = await backend.get_result(task_id)
    except TaskiqResultTimeoutError:
        view.tell_trouble(task_id, "timeout", "not finished in time")
    except TaskiqSaPgError as exc:
        view.tell_trouble(task_id, "trouble", str(exc))
    else:
        view.tell_result(task_id, result)
        return not result.is_err
    return False


class _Lines:
    """A line for each change, where there is no terminal."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass

    def tell_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        self._say(task_id, f"{state_of(progress)} {repr_of(progress.meta)}")

    def tell_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        self._say(task_id, outcome_of(result))

    def tell_trouble(self, task_id: str, event: str, reason: str) -> None:
        self._say(task_id, reason)

    def _say(self, task_id: str, text: str) -> None:
        say(f"{task_id}: {text}")
        sys.stdout.flush()


class _JsonLines(_Lines):
    """A line of JSON for each change."""

    def tell_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        self._tell(task_id, "progress", state=state_of(progress), meta=progress.meta)

    def tell_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        outcome = "failure" if result.is_err else "success"
        self._tell(task_id, outcome, return_value=result.return_value, error=result.error)

    def tell_trouble(self, task_id: str, event: str, reason: str) -> None:
        self._tell(task_id, event, reason=reason)

    def _tell(self, task_id: str, event: str, **values: Any) -> None:
        say_json({"task_id": task_id, "event": event, **values})
        sys.stdout.flush()


class _Bars(_Lines):
    """A bar for each task, live."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console(),
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def tell_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        fraction = fraction_of(progress.meta)
        state = (
            state_of(progress)
            if fraction is not None
            else f"{state_of(progress)} {repr_of(progress.meta)}"
        )
        self._update(task_id, fraction, state)

    def tell_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        self._update(task_id, None if result.is_err else 1.0, outcome_of(result))

    def _say(self, task_id: str, text: str) -> None:
        self._update(task_id, None, text)

    def _update(self, task_id: str, fraction: float | None, state: str) -> None:
        if task_id not in self._bars:
            self._bars[task_id] = self._progress.add_task(printable(task_id), total=None, state="")
        bar, total = self._bars[task_id], None if fraction is None else 1.0
        self._progress.update(bar, total=total, completed=fraction, state=printable(state))


def state_of(progress: TaskProgress[Any]) -> str:
    """The state's name: "STARTED", not "TaskState.STARTED"."""
    return str(getattr(progress.state, "value", progress.state))


def outcome_of(result: TaskiqResult[Any]) -> str:
    """One line on how a task has ended."""
    if not result.is_err:
        return f"success in {result.execution_time:.3f} s: {repr_of(result.return_value)}"
    return f"failure after {result.execution_time:.3f} s: {repr_of(result.error)}"


def fraction_of(meta: Any) -> float | None:
    """How far a task is, from 0 to 1, of `percent` or of `current` and `total`; None unknown."""
    match meta:
        case {"percent": int() | float() as percent}:
            fraction = percent / 100
        case {"current": int() | float() as current, "total": int() | float() as total} if (
            total > 0
        ):
            fraction = current / total
        case _:
            return None
    return None if isnan(fraction) else min(max(fraction, 0.0), 1.0)
