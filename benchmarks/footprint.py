"""What the backends hold: connections, and memory over many results."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import asyncpg
import psutil

from benchmarks.contenders import (
    CONTENDERS,
    OURS,
    Backend,
    Contender,
    make_payload,
    make_result,
    started,
)
from benchmarks.measure import call_all
from benchmarks.plan import Plan

_CALLERS: Final = 1000
_CALLS: Final = 5000
_MEMORY_CALLERS: Final = 100
_MEMORY_STEPS: Final = 4
_PAYLOAD_BYTES: Final = 200


@dataclass(frozen=True, slots=True)
class Connections:
    """How many connections a contender holds, idle and with 1,000 callers."""

    contender: str
    after_startup: int
    with_callers: int
    after_callers: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory and connections of a process that has stored so many results."""

    results: int
    rss_mb: float
    connections: int


async def count_connections(connection: asyncpg.Connection, application_name: str) -> int:
    count: int = await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", application_name
    )
    return count


async def measure_connections(dsn: str) -> list[Connections]:
    print("connections", flush=True)
    connection = await asyncpg.connect(dsn)
    try:
        return [await _measure_connections(each, dsn, connection) for each in CONTENDERS]
    finally:
        await connection.close()


async def _measure_connections(
    contender: Contender, dsn: str, connection: asyncpg.Connection
) -> Connections:
    name = f"connections of {contender.name}"
    result = make_result()
    task_ids = [uuid4().hex for _ in range(_CALLS)]
    async with started(contender, dsn, name) as backend:
        after_startup = await count_connections(connection, name)
        calls = asyncio.create_task(
            call_all(lambda task_id: backend.set_result(task_id, result), task_ids, _CALLERS)
        )
        with_callers = 0
        while not calls.done():
            with_callers = max(with_callers, await count_connections(connection, name))
        await calls
        after_callers = await count_connections(connection, name)
    return Connections(contender.name, after_startup, with_callers, after_callers)


async def measure_memory(dsn: str, plan: Plan) -> list[Memory]:
    """In a process of its own: one that has grown already would not show its growth."""
    print(f"memory over {plan.results:,} results", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, _watch_memory, dsn, plan.results)


def _watch_memory(dsn: str, results: int) -> list[Memory]:
    return asyncio.run(_store_and_watch(dsn, results))


async def _store_and_watch(dsn: str, results: int) -> list[Memory]:
    name = "memory"
    process = psutil.Process()
    connection = await asyncpg.connect(dsn)
    try:
        async with started(OURS, dsn, name) as backend:
            seen = []
            for step in range(_MEMORY_STEPS + 1):
                if step:
                    await _store(backend, results // _MEMORY_STEPS)
                rss_mb = process.memory_info().rss / 1e6
                connections = await count_connections(connection, name)
                seen.append(Memory(step * results // _MEMORY_STEPS, rss_mb, connections))
            return seen
    finally:
        await connection.close()


async def _store(backend: Backend, count: int) -> None:
    result = make_result(make_payload(_PAYLOAD_BYTES))
    shared = iter(range(count))

    async def caller() -> None:
        for _ in shared:
            await backend.set_result(uuid4().hex, result)

    async with asyncio.TaskGroup() as group:
        for _ in range(_MEMORY_CALLERS):
            group.create_task(caller())
