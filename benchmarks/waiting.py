"""How long it takes to hear of a 10 ms task's end, with the task in another process."""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final
from uuid import uuid4

from taskiq import AsyncTaskiqTask

from benchmarks import writer
from benchmarks.contenders import (
    ASYNCPG_PEER,
    CONTENDERS,
    OURS,
    PSYCOPG_PEER,
    Backend,
    Contender,
    started,
)
from benchmarks.measure import percentile
from benchmarks.plan import Plan
from taskiq_sa_pg import SQLAlchemyResultBackend

BACKEND_WAITS: Final = "backend.wait_result"
TASK_WAITS: Final = "task.wait_result"
# Longer than any measurement: it only keeps a failure from hanging.
_TIMEOUT: Final = 60


@dataclass(frozen=True, slots=True)
class Way:
    """A contender and which method waits."""

    contender: Contender
    method: str

    async def wait(self, backend: Backend, task_id: str) -> None:
        if self.method == TASK_WAITS:
            await AsyncTaskiqTask(task_id, backend).wait_result(timeout=_TIMEOUT)
        else:
            assert isinstance(backend, SQLAlchemyResultBackend)
            await backend.wait_result(task_id, timeout=_TIMEOUT)


WAYS: Final = (
    Way(OURS, BACKEND_WAITS),
    Way(OURS, TASK_WAITS),
    Way(ASYNCPG_PEER, TASK_WAITS),
    Way(PSYCOPG_PEER, TASK_WAITS),
)


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds from sending a task to having its result, and from the result's commit."""

    whole: float
    after_commit: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """All waits of one way. `beyond` is the whole time without the task's own."""

    contender: str
    method: str
    waits: int
    whole_p50_ms: float
    whole_p99_ms: float
    beyond_p50_ms: float
    beyond_p99_ms: float
    after_commit_p50_ms: float
    after_commit_p99_ms: float


async def measure_waiting(dsn: str, plan: Plan) -> list[Waiting]:
    print("waiting for 10 ms tasks", flush=True)
    waits: dict[Way, list[Wait]] = {way: [] for way in WAYS}
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(_writer(dsn))
        backends = {
            contender: await stack.enter_async_context(started(contender, dsn, "waiting"))
            for contender in CONTENDERS
        }
        for way in WAYS:
            await _wait_once(way, backends[way.contender], tasks)
        for number in range(plan.waits):
            for way in WAYS:
                if way.contender is OURS or number < plan.peer_waits:
                    waits[way].append(await _wait_once(way, backends[way.contender], tasks))
    return [_summarize(way, waits[way]) for way in WAYS]


async def _wait_once(way: Way, backend: Backend, tasks: Connection) -> Wait:
    task_id = uuid4().hex
    sent = time.monotonic()
    tasks.send((way.contender.name, task_id))
    await way.wait(backend, task_id)
    woken = time.monotonic()
    committed: float = await asyncio.to_thread(tasks.recv)
    return Wait(woken - sent, woken - committed)


@asynccontextmanager
async def _writer(dsn: str) -> AsyncIterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=writer.main, args=(its, dsn), daemon=True)
    process.start()
    # Else its death would not end our pipe.
    its.close()
    try:
        await asyncio.to_thread(ours.recv)
        yield ours
    finally:
        # The end of the pipe ends the process.
        ours.close()
        await asyncio.to_thread(process.join)


def _summarize(way: Way, waits: list[Wait]) -> Waiting:
    whole = [wait.whole * 1000 for wait in waits]
    beyond = [milliseconds - writer.TASK_SECONDS * 1000 for milliseconds in whole]
    after_commit = [wait.after_commit * 1000 for wait in waits]
    return Waiting(
        way.contender.name,
        way.method,
        len(waits),
        *(percentile(values, q) for values in (whole, beyond, after_commit) for q in (0.5, 0.99)),
    )
