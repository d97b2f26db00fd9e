"""What a thousand waiters on unfinished tasks cost the server: statements and connections."""

import asyncio
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from benchmarks.contenders import started
from benchmarks.measure import Plan
from benchmarks.servers import Servers
from benchmarks.waiting import Way, ways_of

WAITERS: Final = 1000
_WARM_UP_SECONDS: Final = 2


@dataclass(frozen=True, slots=True)
class WaitersCost:
    statements_per_second: float
    connections: int


async def measure_waiters(servers: Servers, plan: Plan) -> dict[Way, WaitersCost]:
    """PostgreSQL has to be a COUNTING one."""
    await servers.postgres.connection.execute("CREATE EXTENSION pg_stat_statements")
    return {way: await _measure(way, servers, plan) for way in ways_of(servers)}


async def _measure(way: Way, servers: Servers, plan: Plan) -> WaitersCost:
    print(f"{WAITERS:,} waiters: {way.contender.name}, {way.method}", flush=True)
    server = servers.of(way.contender)
    async with started(way.contender, server.address, "waiters") as backend:
        waiters = [asyncio.create_task(way.wait(backend, uuid4().hex)) for _ in range(WAITERS)]
        await asyncio.sleep(_WARM_UP_SECONDS)
        loop = asyncio.get_running_loop()
        before, since = await server.count_statements(), loop.time()
        await asyncio.sleep(plan.window)
        statements, seconds = await server.count_statements() - before, loop.time() - since
        connections = await server.count_connections("waiters")
        assert not any(waiter.done() for waiter in waiters)
        pending = set(waiters)
        while pending:  # psycopg was seen to swallow a cancellation
            for waiter in pending:
                waiter.cancel()
            _, pending = await asyncio.wait(pending, timeout=1)
        await asyncio.gather(*waiters, return_exceptions=True)
    return WaitersCost(statements / seconds, connections)
