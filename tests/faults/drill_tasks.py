"""The tasks of the drills. Each run is stored as a row, so that runs are counted."""

import asyncio
import os
import signal
from typing import Annotated, Any
from uuid import uuid4

import asyncpg
from taskiq import Context, SmartRetryMiddleware, TaskiqDepends, TaskiqEvents, TaskiqState

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend, build_models

MAX_DELIVERIES = int(os.environ.get("DRILL_MAX_DELIVERIES", "2"))

Ours = Annotated[Context, TaskiqDepends()]

dsn = os.environ["DRILL_DSN"]
models = build_models(queue=True)
backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
    dsn, models=models, max_connections=2, check_schema="off"
)
broker = SQLAlchemyBroker(
    dsn,
    models=models,
    lease=float(os.environ["DRILL_LEASE"]),
    max_deliveries=MAX_DELIVERIES,
    max_connections=2,
    check_schema="off",
).with_result_backend(backend)
broker.add_middlewares(SmartRetryMiddleware(default_delay=0.1))

# For workers that have a queue of their own.
aside = broker.listening_to("aside")


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def connect(state: TaskiqState) -> None:
    state.runs = await asyncpg.create_pool(os.environ["DRILL_RUNS_DSN"], min_size=0, max_size=2)


async def ask_runs(context: Context, query: str, *arguments: object) -> Any:
    """However long PostgreSQL is away, and past the library."""
    while True:
        try:
            return await context.state.runs.fetchval(query, *arguments)
        except Exception:  # noqa: BLE001 - asyncpg has others, too, for a connection that is lost
            await asyncio.sleep(0.05)


async def note_run(context: Context) -> None:
    # It is stored once, even if the answer is lost.
    insert = "INSERT INTO runs (run, task_id, pid) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
    await ask_runs(context, insert, uuid4(), context.message.task_id, os.getpid())


@broker.task
async def work(seconds: float = 0.0, *, context: Ours) -> None:
    await note_run(context)
    await asyncio.sleep(seconds)


@broker.task
async def hold(context: Ours) -> int:
    """Its first run ends with its process only."""
    await note_run(context)
    count = "SELECT count(*) FROM runs WHERE task_id = $1"
    runs = int(await ask_runs(context, count, context.message.task_id))
    if runs == 1:
        await asyncio.Event().wait()
    return runs


@broker.task(retry_on_error=True, max_retries=3)
async def succeed_at_last(context: Ours) -> int:
    await note_run(context)
    retries = int(context.message.labels.get("_retries", 0))
    if retries < 2:
        raise ValueError(retries)
    return retries


@broker.task
async def kill_the_worker(context: Ours) -> None:
    await note_run(context)
    # Meanwhile the quick tasks beside it end.
    await asyncio.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


if "DRILL_IS_OLD" not in os.environ:

    @broker.task
    async def newcomer(context: Ours) -> None:
        await note_run(context)


async def send_and_exit() -> None:
    """For a process that ends before a worker has begun, or before the delay is over."""
    await broker.startup()
    early = await work.kiq()
    delayed = await work.kicker().with_labels(delay=float(os.environ["DRILL_DELAY"])).kiq()
    await broker.shutdown()
    print(early.task_id, delayed.task_id)
