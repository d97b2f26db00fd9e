"""The process whose tasks waiting.py waits for."""

import asyncio
import time
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import Final

from benchmarks.contenders import CONTENDERS, make_result, started

TASK_SECONDS: Final = 0.010


def main(requests: Connection, dsn: str) -> None:
    """Runs a task for each (contender's name, task id), and answers when it was committed."""
    asyncio.run(_serve(requests, dsn))


async def _serve(requests: Connection, dsn: str) -> None:
    result = make_result()
    async with AsyncExitStack() as stack:
        backends = {
            contender.name: await stack.enter_async_context(started(contender, dsn, "writer"))
            for contender in CONTENDERS
        }
        requests.send("ready")
        while True:
            try:
                name, task_id = await asyncio.to_thread(requests.recv)
            except EOFError:
                return
            await asyncio.sleep(TASK_SECONDS)
            await backends[name].set_result(task_id, result)
            # The clock is the same in every process.
            requests.send(time.monotonic())
