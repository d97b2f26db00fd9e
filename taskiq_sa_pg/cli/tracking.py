"""The commands that show the status of tasks."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from taskiq_sa_pg.cli.output import MAX_INT, JsonOption, say_json
from taskiq_sa_pg.cli.tables import Cell, say_fields, say_table
from taskiq_sa_pg.cli.target import Target, TaskId

_HEADERS = ("started at", "seconds", "attempt", "state", "task", "worker", "task id")


async def status(
    target: Target,
    task_id: TaskId,
    json: JsonOption = False,
) -> None:
    """Show a task's status.

    It is queued, started, lost, retrying, succeeded, failed, expired or unknown.
    """
    column_id = target.config.to_column_task_id(task_id)
    async with target.runtime() as runtime:
        found = await runtime.statuses.read(column_id, task_id)
    (say_json if json else say_fields)(asdict(found))


async def running(
    target: Target,
    limit: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Maximum number of tasks.")] = 100,
    json: JsonOption = False,
) -> None:
    """List running and lost tasks.

    The longest running task is first. This needs track="started" and TaskMetadataMiddleware. A task
    is lost if its worker has not been seen for a minute. A lost task is listed until it is started
    again or pruned.
    """
    async with target.runtime() as runtime:
        found = await runtime.statuses.read_running(limit)
    if json:
        say_json([asdict(each) for each in found])
        return
    rows: list[list[Cell]] = []
    now = datetime.now(UTC)
    for each in found:
        started_at, seconds = each.started_at, None
        if started_at is not None:
            seconds = f"{(now - started_at).total_seconds():.1f}"
        names = each.task_name, each.worker, each.task_id
        rows.append([started_at, seconds, str(each.attempt), each.state, *names])
    say_table(_HEADERS, rows, "nothing is running")
