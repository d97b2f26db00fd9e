"""Real `taskiq worker` processes that store a result after each task, and a client that waits."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, TypeVar

from taskiq import AsyncTaskiqTask
from taskiq_redis import ListQueueBroker

from benchmarks.contenders import IN_THE_WORKER, OURS, PEER, REDIS_PEER, Contender
from benchmarks.measure import Plan
from benchmarks.servers import Servers
from benchmarks.waiting import BACKEND_WAITS, TASK_WAITS, Way
from benchmarks.worker_app import have_started, make_broker
from taskiq_sa_pg import SQLAlchemyResultBackend

PROCESSES: Final = (1, 2)
TASKS: Final = 5_000
# With which a client waits for all that it has sent.
WAYS: Final = (
    Way(OURS, BACKEND_WAITS),
    Way(OURS, TASK_WAITS),
    Way(PEER, TASK_WAITS),
    Way(REDIS_PEER, TASK_WAITS),
)

WAITED_WITH: Final = {
    BACKEND_WAITS: "backend.wait_results(tasks)",
    TASK_WAITS: "task.wait_result() of each",
}

_TIMEOUT: Final = 120
_SENT_AT_ONCE: Final = 200

_numbers = itertools.count()
_Key = TypeVar("_Key", bound=Hashable)


class Rate(NamedTuple):
    """Tasks a second, and results a statement where that is known; or the medians of several."""

    per_second: float
    per_statement: float


class InWorker(NamedTuple):
    """The medians of the rounds: by processes, and those that a client waits for."""

    executed: Mapping[tuple[int, Contender], Rate]
    awaited: Mapping[Way, Rate]


async def measure_worker(servers: Servers, plan: Plan) -> InWorker | None:
    """None where there is no Redis, which has the queue."""
    if servers.redis is None:
        return None
    executed: defaultdict[tuple[int, Contender], list[Rate]] = defaultdict(list)
    awaited: defaultdict[Way, list[Rate]] = defaultdict(list)
    for number in range(plan.worker_rounds):
        print(f"in the worker: round {number + 1} of {plan.worker_rounds}", flush=True)
        for processes in PROCESSES:
            for contender in _rotated(IN_THE_WORKER, number):
                executed[processes, contender].append(await _execute(contender, servers, processes))
        for way in _rotated(WAYS, number):
            awaited[way].append(await _await(way, servers))
    return InWorker(_medians(executed), _medians(awaited))


async def _execute(contender: Contender, servers: Servers, processes: int) -> Rate:
    """Fills the queue, and has the workers empty it."""
    async with _prepared(contender, servers) as (broker, environment):
        await _send(broker)
        with _workers(processes, environment):
            return await asyncio.to_thread(_await_rate, Path(environment["BENCH_DIRECTORY"]))


async def _await(way: Way, servers: Servers) -> Rate:
    """Sends to workers that are there, and waits for all results."""
    async with _prepared(way.contender, servers) as (broker, environment):
        assert servers.redis is not None
        with _workers(PROCESSES[-1], environment):
            await have_started(servers.redis.connection, PROCESSES[-1])
            began = time.monotonic()
            tasks = await _send(broker)
            backend = broker.result_backend
            if way.method == BACKEND_WAITS:
                assert isinstance(backend, SQLAlchemyResultBackend)
                await backend.wait_results(tasks, timeout=_TIMEOUT)
            else:
                await asyncio.gather(*(task.wait_result(timeout=_TIMEOUT) for task in tasks))
            return Rate(TASKS / (time.monotonic() - began), 0)


@asynccontextmanager
async def _prepared(
    contender: Contender, servers: Servers
) -> AsyncIterator[tuple[ListQueueBroker, dict[str, str]]]:
    """A client's broker, and the environment of workers that serve it; nothing is stored yet."""
    assert servers.redis is not None
    await servers.redis.connection.flushall()
    # Another queue each time: a worker that was killed may still be popping from its own.
    environment = {
        "BENCH_BACKEND": contender.name,
        "BENCH_DSN": servers.postgres.address,
        "BENCH_REDIS": servers.redis.address,
        "BENCH_QUEUE": f"tasks-{next(_numbers)}",
    }
    broker = make_broker(*environment.values())
    await broker.startup()
    if contender.table:
        await servers.postgres.empty(contender.table)
    try:
        with tempfile.TemporaryDirectory(prefix="taskiq-bench-") as directory:
            yield broker, environment | {"BENCH_DIRECTORY": directory}
    finally:
        await broker.shutdown()


def _task_of(broker: ListQueueBroker) -> Any:
    return broker.find_task("nothing")


async def _send(broker: ListQueueBroker) -> list[AsyncTaskiqTask[Any]]:
    tasks: list[AsyncTaskiqTask[Any]] = []
    for _ in range(0, TASKS, _SENT_AT_ONCE):
        tasks += await asyncio.gather(*[_task_of(broker).kiq() for _ in range(_SENT_AT_ONCE)])
    return tasks


@contextmanager
def _workers(processes: int, environment: Mapping[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.worker_app:broker"]
    options = ["--workers", str(processes), "--log-level", "ERROR"]
    process = subprocess.Popen(
        [*command, *options],
        env={**os.environ, **environment, "BENCH_PROCESSES": str(processes)},
        start_new_session=True,
    )
    try:
        yield
    finally:
        # It has nothing left to do, and an idle worker would take its time to end.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_rate(directory: Path) -> Rate:
    deadline = time.monotonic() + _TIMEOUT
    while True:
        figures = [json.loads(path.read_text("utf-8")) for path in directory.glob("*.json")]
        if sum(each["count"] for each in figures) == TASKS:
            return _rate_of(figures)
        if time.monotonic() > deadline:
            raise TimeoutError(f"the workers did not end: {figures}")
        time.sleep(0.05)


def _rate_of(figures: Sequence[Mapping[str, float]]) -> Rate:
    seconds = max(each["last"] for each in figures) - min(each["first"] for each in figures)
    calls, batches = (sum(each.get(name, 0) for each in figures) for name in ("calls", "batches"))
    return Rate(TASKS / seconds, calls / batches if batches else 0)


def _medians(rates: Mapping[_Key, Sequence[Rate]]) -> dict[_Key, Rate]:
    return {
        key: Rate(*(median(values) for values in zip(*each, strict=True)))
        for key, each in rates.items()
    }


_T = TypeVar("_T")


def _rotated(contenders: Sequence[_T], number: int) -> list[_T]:
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]
