"""The commands that tell what tasks are at."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from taskiq_sa_pg.cli.output import JsonOption, say, say_json, say_table
from taskiq_sa_pg.cli.target import Target


async def status(
    target: Target,
    task_id: Annotated[str, typer.Argument(help="The task.")],
    json: JsonOption = False,
) -> None:
    """Shows a task's status.

    It is queued, started, lost, retrying, succeeded, failed, expired or unknown.
    """
    column_id = target.config.to_column_task_id(task_id)
    async with target.runtime() as runtime:
        found = await runtime.statuses.read(column_id, task_id)
    if json:
        say_json(asdict(found))
        return
    for name, value in asdict(found).items():
        if value is not None:
            say(f"{name + ':':<16}{value}")


async def running(
    target: Target,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    json: JsonOption = False,
) -> None:
    """Lists the tasks that are being executed, the longest running first.

    It needs track="started" and TaskMetadataMiddleware. A task is "lost" if its worker has not been
    seen for a minute. It is listed until it is started again or pruned.
    """
    async with target.runtime() as runtime:
        found = await runtime.statuses.read_running(limit)
    if json:
        say_json([asdict(each) for each in found])
        return
    rows, now = [], datetime.now(UTC)
    for each in found:
        started_at = seconds = ""
        if each.started_at is not None:
            started_at = each.started_at.isoformat(sep=" ", timespec="seconds")
            seconds = f"{(now - each.started_at).total_seconds():.1f}"
        names = each.task_name or "", each.worker or "", each.task_id
        rows.append([started_at, seconds, str(each.attempt), each.state, *names])
    say_table(["started at", "seconds", "attempt", "state", "task", "worker", "task id"], rows)
