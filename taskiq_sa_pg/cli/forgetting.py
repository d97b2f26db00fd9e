"""The command that deletes results by id."""

from taskiq_sa_pg.cli.output import JsonOption, plural, say, say_json
from taskiq_sa_pg.cli.target import Target, TaskIds


async def forget(
    target: Target,
    task_ids: TaskIds,
    json: JsonOption = False,
) -> None:
    """Delete results by task id.

    Progress and status of the tasks are deleted, too. Nothing is decoded. Task ids without a result
    are ignored. Clients that wait for one of the results are not notified, and keep waiting.
    """
    column_ids = {target.config.to_column_task_id(task_id) for task_id in task_ids}
    async with target.runtime() as runtime:
        deleted = await runtime.search.forget(column_ids)
    if json:
        say_json({"deleted": deleted})
    else:
        say(f"{plural(deleted, 'result')} deleted")
