"""What the worker processes of the acceptance tests run; only public names.

Two brokers, one for each type of the payload's column and with it for a serializer, have all tasks.
"""

import os
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from pydantic import BaseModel
from taskiq import AsyncBroker, Context, SimpleRetryMiddleware, TaskiqDepends
from taskiq.depends.progress_tracker import ProgressTracker, TaskState

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend, TaskMetadataMiddleware

dsn = os.environ["TASKIQ_SA_PG_DSN"]


def make_broker(payload: Any) -> AsyncBroker:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        dsn,
        table_name=f"results_{payload}",
        field_for_payload=payload,
        track="started",
        run_migrations=True,
    )
    return (
        SQLAlchemyBroker(dsn, table_name=f"results_{payload}", run_migrations=True)
        .with_result_backend(backend)
        .with_middlewares(SimpleRetryMiddleware(default_retry_count=3), TaskMetadataMiddleware())
    )


bytea_broker, jsonb_broker = make_broker("Bytea"), make_broker("Jsonb")


def task(**labels: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__  # taskiq changes it
        for broker in (bytea_broker, jsonb_broker):
            broker.register_task(function, name, **labels)
        return function

    return register


class Order(BaseModel):
    number: int
    price: Decimal
    placed_at: datetime


@dataclass
class Point:
    x: int
    y: int


class PaymentError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"payment refused with code {code}")
        self.code = code


@task()
async def place(number: int, placed_at: datetime) -> Order:
    return Order(number=number, price=Decimal("9.90"), placed_at=placed_at)


@task()
def mirror(x: int, y: int) -> Point:
    return Point(y, x)


@task()
async def add(a: int, b: int) -> int:
    return a + b


@task()
async def pay() -> None:
    try:
        raise ConnectionError("the bank does not answer")
    except ConnectionError as exc:
        raise PaymentError(code=7) from exc


@task()
async def return_a_lambda() -> Any:
    return lambda: None


@task()
async def report(steps: int, tracker: ProgressTracker[int] = TaskiqDepends()) -> str:
    for step in range(steps):
        await tracker.set_progress(TaskState.STARTED, step)
    return "reported"


@task(retry_on_error=True)
async def fail_until_attempt(attempt: int, context: Context = TaskiqDepends()) -> int:
    current = int(context.message.labels.get("_retries", 0))
    if current < attempt:
        raise RuntimeError(f"attempt {current}")
    return current


@task()
async def hold(gate: str, context: Context = TaskiqDepends()) -> int:
    """Runs until there is progress of the gate."""
    backend: Any = context.broker.result_backend
    async with aclosing(backend.watch_progress(gate)) as opened:
        async for _ in opened:
            break
    return os.getpid()
