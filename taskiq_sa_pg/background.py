"""Tasks of the package's own: what goes on beside the calls of an application."""

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

_T = TypeVar("_T")


def start_task(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    """Starts a task that belongs to nobody who calls.

    Its context is empty, so that it keeps no caller's context variables alive and appears in no
    caller's trace. Whatever the event loop's task factory is, it does not begin before this
    returns (`asyncio.eager_task_factory` would).
    """
    return asyncio.Task(work, loop=asyncio.get_running_loop(), context=Context())


def is_running(task: asyncio.Task[Any] | None) -> bool:
    """Whether a task was started and has not ended, be it by a cancellation."""
    return task is not None and not task.done()


async def end_task(task: asyncio.Task[Any] | None) -> None:
    """Cancels a task, if there is one, and returns when it has ended."""
    while task is not None and not task.done():
        # Again and again: psycopg has been seen to swallow a cancellation as it connects.
        task.cancel()
        await asyncio.wait([task], timeout=1)
