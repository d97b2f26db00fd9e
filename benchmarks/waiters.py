"""What a thousand waiters on unfinished tasks cost the server: statements and connections."""

import asyncio
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import asyncpg

from benchmarks.contenders import started
from benchmarks.footprint import count_connections
from benchmarks.plan import Plan
from benchmarks.waiting import WAYS, Way

# Counting costs time, so this is for a server of its own.
SETTINGS: Final = {"shared_preload_libraries": "pg_stat_statements"}
WAITERS: Final = 1000

_COUNT: Final = (
    "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements "
    "WHERE query NOT LIKE '%pg_stat_%'"
)


@dataclass(frozen=True, slots=True)
class WaitersCost:
    contender: str
    method: str
    statements_per_second: float
    connections: int


async def measure_waiters(dsn: str, plan: Plan) -> list[WaitersCost]:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("CREATE EXTENSION pg_stat_statements")
        return [await _measure(way, dsn, plan, connection) for way in WAYS]
    finally:
        await connection.close()


async def _measure(way: Way, dsn: str, plan: Plan, connection: asyncpg.Connection) -> WaitersCost:
    print(f"{WAITERS:,} waiters: {way.contender.name}, {way.method}", flush=True)
    async with started(way.contender, dsn, way.method) as backend:
        waiters = [asyncio.create_task(way.wait(backend, uuid4().hex)) for _ in range(WAITERS)]
        await asyncio.sleep(plan.warm_up)
        loop = asyncio.get_running_loop()
        await connection.execute("SELECT pg_stat_statements_reset()")
        since = loop.time()
        await asyncio.sleep(plan.window)
        statements = await connection.fetchval(_COUNT)
        seconds = loop.time() - since
        connections = await count_connections(connection, way.method)
        assert not any(waiter.done() for waiter in waiters)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
    return WaitersCost(way.contender.name, way.method, statements / seconds, connections)
