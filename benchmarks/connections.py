"""The most connections that a contender has while a thousand callers store results."""

import asyncio
from itertools import islice
from typing import Final

from benchmarks.contenders import Contender, make_result, new_ids, started
from benchmarks.measure import call_each
from benchmarks.servers import Servers

CALLERS: Final = 1000
_CALLS: Final = 5000


async def measure_connections(servers: Servers) -> dict[Contender, int]:
    print("connections", flush=True)
    return {each: await _measure(each, servers) for each in servers.contenders}


async def _measure(contender: Contender, servers: Servers) -> int:
    server, result, most = servers.of(contender), make_result(), 0
    async with started(contender, server.address, "connections") as backend:
        calls = asyncio.create_task(
            call_each(
                lambda task_id: backend.set_result(task_id, result),
                islice(new_ids(), _CALLS),
                CALLERS,
            )
        )
        while not calls.done():
            most = max(most, await server.count_connections("connections"))
        await calls
    return most
