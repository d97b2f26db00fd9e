"""A task that reports its progress.

Start a worker with `taskiq worker quickstart:broker progress`, then run `python progress.py`.
"""

import asyncio
from typing import Any

from quickstart import broker
from taskiq import AsyncTaskiqTask, TaskiqDepends
from taskiq.depends.progress_tracker import ProgressTracker, TaskProgress, TaskState


@broker.task
async def solve_slowly(tracker: ProgressTracker[dict[str, str]] = TaskiqDepends()) -> int:
    meta = {"start_message": "Starting to solve problems"}
    await tracker.set_progress(TaskState.STARTED, meta)
    await asyncio.sleep(2)
    meta["halfway_message"] = "Halfway done!"
    await tracker.set_progress(TaskState.STARTED, meta)
    await asyncio.sleep(2)
    return 42


async def wait_for_message(task: AsyncTaskiqTask[int], message: str) -> TaskProgress[Any]:
    """Polls every 50 ms until the task has reported the message."""
    while True:
        progress = await task.get_progress()
        if progress is not None and message in (progress.meta or {}):
            return progress
        await asyncio.sleep(0.05)


async def main() -> None:
    await broker.startup()
    task = await solve_slowly.kiq()
    async with asyncio.timeout(30):
        print(await wait_for_message(task, "start_message"))
        print(await wait_for_message(task, "halfway_message"))
    print(await task.wait_result(timeout=30))
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
