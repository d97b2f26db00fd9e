"""How a task ended, for the commands that wait for tasks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from taskiq import TaskiqResult
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.cli.output import repr_of, say, say_json
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import select_progress, select_results


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a task.

    Attributes:
        task_id: The task.
        kind: "progress", "success", "failure", "timeout" or "trouble".
        text: The same in words.
        fields: The same for JSON.
    """

    task_id: str
    kind: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Show = Callable[[Event], None]
Wait = Callable[[str], Awaitable[TaskiqResult[Any]]]


@asynccontextmanager
async def waiting_backend(
    target: Target, task_ids: Iterable[str]
) -> AsyncIterator[SQLAlchemyResultBackend[Any]]:
    """A backend to wait with, if the ids are possible and the tables exist."""
    for task_id in task_ids:
        target.config.to_column_task_id(task_id)
    # Not the backend's check of the tables: it refuses an application's column that is NOT NULL,
    # which is only in the way of writing.
    async with target.runtime() as runtime:
        for select in (select_results, select_progress):
            await runtime.database.fetch(select(target.models), {"task_ids": []}, "watch tasks")
    async with target.backend(check_schema="off") as backend:
        yield backend


async def end_of_each(task_ids: Iterable[str], wait: Wait, show: Show) -> set[str]:
    """Waits for all tasks at once, shows how each ended, and returns the kinds of events."""
    try:
        async with asyncio.TaskGroup() as group:
            ends = [
                group.create_task(_end_of(task_id, wait, show))
                for task_id in dict.fromkeys(task_ids)
            ]
    except ExceptionGroup as exc:
        # One is printed, such as a closed pipe, as by the other commands.
        raise exc.exceptions[0] from None
    return {each.result() for each in ends}


async def _end_of(task_id: str, wait: Wait, show: Show) -> str:
    try:
        result = await wait(task_id)
    except TaskiqResultTimeoutError:
        reason = "not finished in time"
        event = Event(task_id, "timeout", reason, {"reason": reason})
    except TaskiqSaPgError as exc:
        event = Event(task_id, "trouble", str(exc), {"reason": str(exc)})
    else:
        value, error, seconds = result.return_value, result.error, f"{result.execution_time:.3f} s"
        fields = {"return_value": value, "error": error}
        if result.is_err:
            event = Event(task_id, "failure", f"failure after {seconds}: {repr_of(error)}", fields)
        else:
            event = Event(task_id, "success", f"success in {seconds}: {repr_of(value)}", fields)
    show(event)
    return event.kind


def say_event(event: Event) -> None:
    """Prints an event as a line."""
    say(f"{event.task_id}: {event.text}")


def say_event_json(event: Event) -> None:
    """Prints an event as a line of JSON."""
    say_json({"task_id": event.task_id, "event": event.kind, **event.fields})
