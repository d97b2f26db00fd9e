"""The command that shows tasks at work."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isnan
from typing import Any

import typer
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text
from taskiq import TaskiqResult

from taskiq_sa_pg.cli.outcomes import (
    Event,
    Show,
    end_of_each,
    say_event,
    say_event_json,
    waiting_backend,
)
from taskiq_sa_pg.cli.output import JsonOption, printable, repr_of
from taskiq_sa_pg.cli.tables import console, is_terminal, styled
from taskiq_sa_pg.cli.target import Target, TaskIds, TimeoutOption

# What a row shows at the end of a task.
_ENDS = {"success": "succeeded", "failure": "failed", "timeout": "timed out", "trouble": "failed"}

# Seconds of progress by which the remaining time is estimated.
_ESTIMATED_BY = 600


async def watch(
    target: Target,
    task_ids: TaskIds,
    timeout: TimeoutOption = None,
    json: JsonOption = False,
) -> None:
    """Show live progress of tasks.

    It ends when all tasks have finished. The exit status is 1 if one has failed, or has not
    finished in time. Metadata with `percent`, or with `current` and `total`, fills a bar; `message`
    is shown next to it. The elapsed time counts from the start of the command.
    """
    view: AbstractContextManager[Show] = (
        nullcontext(say_event_json)
        if json
        else rows_of(task_ids)
        if is_terminal()
        else nullcontext(say_event)
    )
    async with waiting_backend(target, task_ids) as backend:
        with view as show:

            async def result_of(task_id: str) -> TaskiqResult[Any]:
                async for progress in backend.watch_progress(task_id, timeout):
                    # The name: "STARTED", not "TaskState.STARTED".
                    state = str(getattr(progress.state, "value", progress.state))
                    text = f"{state} {repr_of(progress.meta)}"
                    show(Event(task_id, "progress", text, {"state": state, "meta": progress.meta}))
                return await backend.get_result(task_id)

            ends = await end_of_each(task_ids, result_of, show)
    if ends - {"success"}:
        raise typer.Exit(1)


class _State(ProgressColumn):
    """A state in its colour, or the message of a task."""

    def render(self, task: Task) -> Text:
        """What the row shows."""
        return styled(task.fields["state"])


class _Remaining(TimeRemainingColumn):
    """The estimated time until a task ends, if there is an estimate."""

    def render(self, task: Task) -> Text:
        """What the row shows."""
        is_known = task.time_remaining and not (task.finished or task.stop_time)
        return Text("ETA ").append(super().render(task)) if is_known else Text()


@contextmanager
def rows_of(task_ids: Iterable[str]) -> Iterator[Show]:
    """A row for each task, live; above the rows, a line for each task that has ended."""
    shown = {task_id: printable(task_id) for task_id in task_ids}
    widest = max(map(len, shown.values()))
    columns = (
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column("task", no_wrap=True, min_width=widest),
        ),
        BarColumn(10),
        TextColumn("{task.fields[percentage]:>4}", style="progress.percentage"),
        TimeElapsedColumn(),
        _Remaining(compact=True),
        _State(Column("state", ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    drawing = console()
    with Progress(
        *columns, console=drawing, expand=True, speed_estimate_period=_ESTIMATED_BY
    ) as progress:
        rows = {
            task_id: progress.add_task(text, total=None, percentage="", state="waiting")
            for task_id, text in shown.items()
        }

        def show(event: Event) -> None:
            row = rows[event.task_id]
            if event.kind == "progress":
                meta = event.fields["meta"]
                fraction = fraction_of(meta)
                state = message_of(meta) or (event.text if fraction is None else "")
                state = state or event.fields["state"]
                if fraction is not None:
                    text = f"{fraction:.0%}"
                    progress.update(row, total=1.0, completed=fraction, percentage=text)
                progress.update(row, state=printable(state))
                return
            drawing.print(printable(f"{event.task_id}: {event.text}"), soft_wrap=True)
            # A task that has not succeeded keeps its last percentage.
            full: dict[str, Any] = {"completed": 1.0, "percentage": "100%"}
            ended = full if event.kind == "success" else {}
            progress.update(row, total=1.0, state=_ENDS[event.kind], **ended)
            progress.stop_task(row)

        yield show


def message_of(meta: Any) -> str:
    """The message in a task's metadata; "" without one."""
    match meta:
        case str(text) | {"message": str(text)}:
            return text
        case _:
            return ""


def fraction_of(meta: Any) -> float | None:
    """How far a task is, from 0 to 1, by `percent`, or `current` and `total`; None: unknown."""
    match meta:
        case {"percent": int() | float() as percent}:
            fraction = percent / 100
        case {"current": int() | float() as done, "total": int() | float() as total} if total > 0:
            fraction = done / total
        case _:
            return None
    return None if isnan(fraction) else min(max(fraction, 0.0), 1.0)
