"""The package's background tasks."""

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

_T = TypeVar("_T")


def start_task(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    """Starts a task that is independent of the caller.

    Its context is empty, so that it does not keep the caller's context variables alive or appear in
    the caller's trace. It starts after this returns, even if the event loop's task factory is
    `asyncio.eager_task_factory`.
    """
    return asyncio.Task(work, loop=asyncio.get_running_loop(), context=Context())


def is_running(task: asyncio.Task[Any] | None) -> bool:
    """Whether a task was started and is not done or cancelled."""
    return task is not None and not task.done()


async def end_task(task: asyncio.Task[Any] | None) -> None:
    """Cancels a task, if there is one, and returns when it has ended."""
    while task is not None and not task.done():
        # Repeatedly: psycopg may swallow a cancellation while it connects.
        task.cancel()
        await asyncio.wait([task], timeout=1)


def leave_to_parent(loop: asyncio.AbstractEventLoop, *belongings: object) -> None:
    """In the child of a fork: keeps what the parent has on this event loop from being collected.

    asyncpg would then remove its sockets from the selector, which both processes share. An event
    loop that ran in another thread is never collected in the child, and it never runs there.
    """
    if loop.is_running():
        loop.call_soon_threadsafe(id, belongings)
