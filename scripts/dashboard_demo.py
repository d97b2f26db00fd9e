"""A dashboard with a week of tasks of a shop that never was, on a PostgreSQL of its own.

`python -m scripts.dashboard_demo` serves it at http://127.0.0.1:8000 until it is interrupted;
`scripts.screenshots` and the browser's tests fill theirs with the same tasks.
"""

import asyncio
import json
import math
import random
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import uvicorn
from sqlalchemy import JSON, insert, literal_column
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg import (
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
    TaskStatus,
)
from taskiq_sa_pg.embedded import postgres
from taskiq_sa_pg.ui import dashboard

Backend = SQLAlchemyResultBackend[Any]

TASKS: Final = [
    # name, share of all, median seconds, share of failures
    ("shop.orders:pack", 0.34, 1.8, 0.03),
    ("shop.orders:charge_card", 0.24, 0.45, 0.05),
    ("shop.mail:send_receipt", 0.28, 0.12, 0.01),
    ("shop.images:make_thumbnails", 0.1, 4.2, 0.02),
    ("shop.reports:monthly_turnover", 0.04, 22.0, 0.08),
]
WORKERS: Final = ["worker-1.shop:4711", "worker-1.shop:4712", "worker-2.shop:902"]


# So many tasks of so many last hours.
COUNTS: Final = ((1, 400), (24, 4_000), (168, 12_000))


class CardDeclinedError(Exception):
    """What a bank says."""

    __module__ = "shop.errors"


def charge(order_id: int, cents: int) -> None:
    """Fails as a task would, so that there is a traceback to look at."""
    answer = {"order": order_id, "approved": False, "reason": "insufficient funds"}
    if not answer["approved"]:
        raise CardDeclinedError(f"the bank declined {cents / 100:.2f} EUR: {answer['reason']}")


def send(_: int, __: int) -> None:
    """The same of a mail."""
    raise ConnectionRefusedError(111, "mail.shop.example:587 refused the connection")


def ask_warehouse(order_id: int, _: int) -> None:
    """The same of a report."""
    raise LookupError(f"order {order_id} has no items:\nthey were all returned")


FAILURES: Final = {"shop.orders:charge_card": charge, "shop.mail:send_receipt": send}


def failure_of(name: str, order_id: int, cents: int) -> BaseException:
    """An exception with a traceback, as a task of this name raises it."""
    try:
        FAILURES.get(name, ask_warehouse)(order_id, cents)
    except (CardDeclinedError, OSError, LookupError) as exc:
        return exc
    raise AssertionError(name)


def row_of(backend: Backend, chance: random.Random, finished_at: datetime) -> dict[str, Any]:
    """One row of the results table."""
    name, _, median, failing = chance.choices(TASKS, [share for _, share, _, _ in TASKS])[0]
    order_id, cents = chance.randint(10_000, 99_999), chance.randint(500, 250_000)
    seconds = median * math.exp(chance.gauss(0, 0.55))
    waited = 0.02 * math.exp(chance.gauss(0, 0.9)) * (1 + 40 * busy(finished_at) ** 4)
    is_err = chance.random() < failing * (6 if is_outage(finished_at) else 1)
    result: TaskiqResult[Any] = TaskiqResult(
        is_err=is_err,
        return_value=None if is_err else value_of(name, order_id, cents),
        execution_time=seconds,
        error=failure_of(name, order_id, cents) if is_err else None,
        labels={"user": str(chance.randint(1, 60)), "shop": chance.choice(["berlin", "lyon"])},
    )
    task_id = uuid.UUID(int=chance.getrandbits(128), version=4).hex
    row = backend.settings.codec.encode_result(task_id, result)._asdict()
    for column in ("return_value", "error", "labels"):
        if row[column] is not None:
            row[column] = JSON.NULL if row[column] == "null" else json.loads(row[column])
    if row["traceback"] is not None:  # pictures show no path of the machine they were taken on
        row["traceback"] = re.sub('File ".*?"', 'File "/srv/shop/tasks.py"', row["traceback"])
    started_at = finished_at - timedelta(seconds=seconds)
    return row | {
        "task_name": name,
        "args": [order_id],
        "kwargs": {"cents": cents, "currency": "EUR"},
        "worker": chance.choice(WORKERS),
        "queued_at": started_at - timedelta(seconds=waited),
        "started_at": started_at,
        "finished_at": finished_at,
        "expires_at": None,
    }


def value_of(name: str, order_id: int, cents: int) -> Any:
    """What such a task returns."""
    if name == "shop.mail:send_receipt":
        return f"Dear customer,\nyour order {order_id} has been packed.\n\nYour shop"
    return {"order_id": order_id, "cents": cents, "receipt": 9_007_199_254_740_993 + order_id}


def busy(at: datetime) -> float:
    """How busy the shop is, 0 to 1: by the hour, and by the minute."""
    hour = at.hour + at.minute / 60
    return 0.55 + 0.3 * math.sin((hour - 8) / 24 * 2 * math.pi) + 0.15 * math.sin(at.minute / 4)


def is_outage(at: datetime) -> bool:
    """The bank is down for ten minutes of each hour."""
    return 20 <= at.minute < 30


async def fill(
    backend: Backend, *, counts: Sequence[tuple[float, int]] = COUNTS, seed: int = 7
) -> None:
    """Stores so many tasks of so many last hours, and some that are not finished.

    The same seed gives the same tasks, at the same distances from now.
    """
    chance = random.Random(seed)  # noqa: S311 - pictures need no secrecy
    now = datetime.now(UTC)
    times: list[datetime] = []
    for span in (timedelta(hours=hours) for hours, count in counts for _ in range(count)):
        at = now - span * chance.random()
        while chance.random() > busy(at):
            at = now - span * chance.random()
        times.append(at)
    rows = [row_of(backend, chance, at) for at in sorted(times)]
    async with backend.database.engine.begin() as connection:
        await connection.execute(insert(backend.models.Result), rows)
    await run_some(backend, chance, now)


async def run_some(backend: Backend, chance: random.Random, now: datetime) -> None:
    """Tasks that are executed, with progress, and some that wait."""
    states: list[tuple[str, float, TaskProgress[Any] | None]] = [
        ("shop.reports:monthly_turnover", 94, TaskProgress(state="reading orders", meta=62)),
        (
            "shop.images:make_thumbnails",
            12,
            TaskProgress(state="resizing", meta={"done": 3, "total": 8}),
        ),
        ("shop.orders:pack", 3, TaskProgress(state="looking for a box", meta=None)),
    ]
    for name, seconds, progress in states:
        task_id = uuid.UUID(int=chance.getrandbits(128), version=4).hex
        started_at = now - timedelta(seconds=seconds)
        await backend.set_status(
            TaskStatus(task_id, "started", name, 0, started_at, started_at, chance.choice(WORKERS))
        )
        if progress is not None:
            await backend.set_progress(task_id, progress)
    for seconds in (48, 20, 9):
        task_id = uuid.UUID(int=chance.getrandbits(128), version=4).hex
        queued_at = now - timedelta(seconds=seconds)
        await backend.set_status(
            TaskStatus(task_id, "queued", "shop.reports:monthly_turnover", 0, queued_at)
        )


async def employ(backend: Backend, now: datetime) -> None:
    """The workers, of which one has died."""
    table = backend.models.workers_table
    assert table is not None
    names = [*WORKERS, "worker-3.shop:77"]
    rows = [
        {
            "worker": name,
            "started_at": now - timedelta(hours=31 - 9 * number),
            "seen_at": now - timedelta(seconds=4 if name in WORKERS else 900),
        }
        for number, name in enumerate(names)
    ]
    async with backend.database.engine.begin() as connection:
        await connection.execute(insert(table), rows)


async def enqueue(broker: SQLAlchemyBroker, backend: Backend, now: datetime) -> None:
    """Tasks that wait, run or were given up, and schedules."""
    queue, schedules = broker.models.queue_table, broker.models.schedules_table
    assert queue is not None
    assert schedules is not None
    ago = [now - timedelta(seconds=seconds) for seconds in (48, 20, 9)]
    tasks: list[tuple[Any, ...]] = [
        ("default", "shop.reports:monthly_turnover", ago[n], ago[n], 0, None) for n in range(3)
    ]
    tasks += [("mail", "shop.mail:send_receipt", now, now + timedelta(minutes=10), 0, None)] * 4
    tasks += [("default", "shop.orders:pack", now, now + timedelta(minutes=1), 1, WORKERS[0])]
    given_up = now - timedelta(hours=3)
    tasks += [("default", "shop.images:make_thumbnails", given_up, None, 6, WORKERS[2])] * 2
    names = ("queue_name", "task_name", "queued_at", "available_at", "deliveries", "worker")
    rows: list[dict[str, Any]] = [dict(zip(names, task, strict=True)) for task in tasks]
    for number, row in enumerate(rows):
        row |= {"task_id": uuid.uuid5(uuid.NAMESPACE_DNS, f"task {number}").hex, "message": b"{}"}
        row["available_at"] = row["available_at"] or literal_column("'infinity'")
    message = {"args": [], "kwargs": {}, "labels": {}, "cron_offset": "Europe/Berlin"}
    at: dict[str, Any] = {
        "is_labelled": False,
        "last_tick": now - timedelta(minutes=7),
        "message": b"",
    }
    dues: list[dict[str, Any]] = [
        {"task_name": "shop.reports:monthly_turnover", "cron": "30 6 1 * *"},
        {"task_name": "shop.mail:send_reminders", "cron": "0 9 * * 1-5"},
        {"task_name": "shop.orders:clean_up", "interval": timedelta(minutes=15)},
    ]
    async with backend.database.engine.begin() as connection:
        for row in rows:
            await connection.execute(insert(queue).values(row))
        for number, due in enumerate(dues):
            values = at | due | {"message": json.dumps(message).encode()}
            values["schedule_id"] = uuid.uuid5(uuid.NAMESPACE_DNS, f"schedule {number}").hex
            await connection.execute(insert(schedules).values(values))


@asynccontextmanager
async def filled(dsn: str) -> AsyncIterator[tuple[Backend, SQLAlchemyBroker]]:
    """A started backend with the shop's tasks, and a broker with its queue."""
    backend = Backend(dsn, field_for_payload="Jsonb", track="started", run_migrations=True)
    broker = SQLAlchemyBroker(dsn, run_migrations=True).with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(record_args=True))
    await broker.startup()
    try:
        now = datetime.now(UTC)
        await fill(backend)
        await employ(backend, now)
        await enqueue(broker, backend, now)
        yield backend, broker
    finally:
        await broker.shutdown()


async def main() -> None:
    with postgres() as server:
        async with filled(server.dsn) as (backend, broker):
            app = dashboard(backend, authorize=lambda _: "write", broker=broker, title="Shop tasks")
            print("http://127.0.0.1:8000")
            await uvicorn.Server(uvicorn.Config(app, port=8000, log_level="warning")).serve()


if __name__ == "__main__":
    asyncio.run(main())
