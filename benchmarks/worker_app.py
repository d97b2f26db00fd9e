"""The broker that `taskiq worker` runs for benchmarks.worker; its environment says with what."""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from taskiq import TaskiqMessage, TaskiqMiddleware, TaskiqResult
from taskiq_redis import ListQueueBroker

from benchmarks.contenders import IN_THE_WORKER
from taskiq_sa_pg import SQLAlchemyResultBackend, TaskMetadataMiddleware

STARTED = "started"  # in Redis: how many processes have

# So long nothing has ended: the queue is empty, or will not become so.
_IDLE_SECONDS = 0.2


class Stopwatch(TaskiqMiddleware):
    """Has all processes begin together, and writes when this one began and ended, and how much."""

    def __init__(self, redis_url: str, directory: Path, processes: int) -> None:
        super().__init__()
        self._redis_url = redis_url
        self._directory = directory
        self._processes = processes
        self._start: asyncio.Task[None] | None = None
        self._first = self._last = 0.0
        self._count = 0
        self._writer: asyncio.TimerHandle | None = None

    async def startup(self) -> None:
        async with Redis.from_url(self._redis_url) as redis:
            await redis.incr(STARTED)

    async def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        if self._start is None:
            self._start = asyncio.create_task(self._begin_together())
        if not self._start.done():
            await asyncio.shield(self._start)
        return message

    def post_save(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        self._count += 1
        self._last = time.monotonic()
        if self._writer is None:
            loop = asyncio.get_running_loop()
            self._writer = loop.call_later(_IDLE_SECONDS, self._write_when_idle)

    async def _begin_together(self) -> None:
        async with Redis.from_url(self._redis_url) as redis:
            await have_started(redis, self._processes)
        self._first = time.monotonic()

    def _write_when_idle(self) -> None:
        self._writer = None
        if time.monotonic() - self._last < _IDLE_SECONDS:
            loop = asyncio.get_running_loop()
            self._writer = loop.call_later(_IDLE_SECONDS, self._write_when_idle)
            return
        figures = {"first": self._first, "last": self._last, "count": self._count}
        backend = self.broker.result_backend
        if isinstance(backend, SQLAlchemyResultBackend):
            stored = backend.stats().operations["set_result"]
            figures |= {"calls": stored.calls, "batches": stored.batches}
        path = self._directory / f"{os.getpid()}.json"
        path.with_suffix(".new").write_text(json.dumps(figures), "utf-8")
        path.with_suffix(".new").rename(path)


async def have_started(redis: Redis, processes: int) -> None:
    """Returns when so many worker processes have."""
    while int(await redis.get(STARTED) or 0) < processes:  # noqa: ASYNC110 - of other processes
        await asyncio.sleep(0.001)


def make_broker(name: str, dsn: str, redis_url: str, queue: str) -> ListQueueBroker:
    """The broker with the result backend of this name, for both sides."""
    contender = next(each for each in IN_THE_WORKER if each.name == name)
    broker = ListQueueBroker(redis_url, queue_name=queue)
    if contender.make is not None:
        address = redis_url if contender.uses_redis else dsn
        broker = broker.with_result_backend(contender.make(address, contender.table))
    if contender.has_metadata:
        broker.add_middlewares(TaskMetadataMiddleware())
    broker.task(task_name="nothing")(lambda: None)
    return broker


if "BENCH_BACKEND" in os.environ:  # in a worker
    names = ("BENCH_BACKEND", "BENCH_DSN", "BENCH_REDIS", "BENCH_QUEUE")
    broker = make_broker(*(os.environ[name] for name in names))
    broker.add_middlewares(
        Stopwatch(
            os.environ["BENCH_REDIS"],
            Path(os.environ["BENCH_DIRECTORY"]),
            int(os.environ["BENCH_PROCESSES"]),
        )
    )
