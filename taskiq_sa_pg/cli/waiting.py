"""The command that waits for results."""

from typing import Any, Final

import typer
from taskiq import TaskiqResult

from taskiq_sa_pg.cli.outcomes import end_of_each, say_event, say_event_json, waiting_backend
from taskiq_sa_pg.cli.output import JsonOption
from taskiq_sa_pg.cli.target import Target, TaskIds, TimeoutOption

# As of the command `timeout`.
_TIMED_OUT: Final = 124


async def wait(
    target: Target,
    task_ids: TaskIds,
    timeout: TimeoutOption = None,
    json: JsonOption = False,
) -> None:
    """Wait for results and print them.

    Each result is printed when it is stored, and is kept. The exit status is 0 if all tasks have
    succeeded, 1 if one has failed or its result cannot be read, and 124 if one has not finished in
    time and none has failed.
    """
    async with waiting_backend(target, task_ids) as backend:

        async def result_of(task_id: str) -> TaskiqResult[Any]:
            return await backend.wait_result(task_id, timeout)

        ends = await end_of_each(task_ids, result_of, say_event_json if json else say_event)
    if ends - {"success"}:
        raise typer.Exit(_TIMED_OUT if ends <= {"success", "timeout"} else 1)
