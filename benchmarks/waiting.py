"""How soon a waiter hears of a 10 ms task's result, which another process stores."""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final, NamedTuple
from uuid import uuid4

from taskiq import AsyncTaskiqTask

from benchmarks.contenders import CONTENDERS, OURS, Backend, Contender, make_result, started
from benchmarks.measure import Plan, percentiles
from benchmarks.servers import Servers
from taskiq_sa_pg import SQLAlchemyResultBackend

BACKEND_WAITS: Final = "backend.wait_result()"
TASK_WAITS: Final = "task.wait_result()"
TASK_SECONDS: Final = 0.010
# Longer than any measurement: it only keeps a failure from hanging.
_TIMEOUT: Final = 60


@dataclass(frozen=True, slots=True)
class Way:
    """A contender and the method that waits."""

    contender: Contender
    method: str

    async def wait(self, backend: Backend, task_id: str) -> None:
        if self.method == TASK_WAITS:
            await AsyncTaskiqTask(task_id, backend).wait_result(timeout=_TIMEOUT)
        else:
            assert isinstance(backend, SQLAlchemyResultBackend)
            await backend.wait_result(task_id, timeout=_TIMEOUT)


def ways_of(servers: Servers) -> list[Way]:
    taskiqs_own = [Way(contender, TASK_WAITS) for contender in servers.contenders]
    return [Way(OURS, BACKEND_WAITS), *taskiqs_own]


class Waits(NamedTuple):
    """p50 and p99 in ms: from sending a task to having its result, and from storing that."""

    whole: tuple[float, float]
    after_storing: tuple[float, float]


async def measure_waiting(servers: Servers, plan: Plan) -> dict[Way, Waits]:
    print("waiting for 10 ms tasks", flush=True)
    addresses = {each.name: servers.of(each).address for each in servers.contenders}
    waits: dict[Way, list[tuple[float, float]]] = {way: [] for way in ways_of(servers)}
    async with AsyncExitStack() as stack:
        # Who waits starts first: the writer would make the tables at the same time.
        backends = {
            each: await stack.enter_async_context(started(each, addresses[each.name], "waiting"))
            for each in servers.contenders
        }
        tasks = await stack.enter_async_context(_writer(addresses))
        for number in range(plan.waits + 1):
            for way, found in waits.items():
                wait = await _wait_once(way, backends[way.contender], tasks)
                if number:  # the first one is to warm up
                    found.append(wait)
    return {
        way: Waits(*(percentiles(each) for each in zip(*found, strict=True)))
        for way, found in waits.items()
    }


async def _wait_once(way: Way, backend: Backend, tasks: Connection) -> tuple[float, float]:
    task_id = uuid4().hex
    sent = time.monotonic()
    tasks.send((way.contender.name, task_id))
    await way.wait(backend, task_id)
    woken = time.monotonic()
    stored: float = await asyncio.to_thread(tasks.recv)
    return (woken - sent) * 1000, (woken - stored) * 1000


@asynccontextmanager
async def _writer(addresses: Mapping[str, str]) -> AsyncIterator[Connection]:
    """A process that runs a task for each (contender's name, task id) sent to it."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, addresses), daemon=True)
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


def _serve(requests: Connection, addresses: Mapping[str, str]) -> None:
    asyncio.run(_run_tasks(requests, addresses))


async def _run_tasks(requests: Connection, addresses: Mapping[str, str]) -> None:
    result = make_result()
    async with AsyncExitStack() as stack:
        backends = {
            each.name: await stack.enter_async_context(
                started(each, addresses[each.name], "writer")
            )
            for each in CONTENDERS
            if each.name in addresses
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
