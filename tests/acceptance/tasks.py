"""What the worker processes of the acceptance tests run; only public names.

ACCEPTANCE_PAYLOAD chooses the payload's column type, and with it the serializer.
"""

import os
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from pydantic import BaseModel
from taskiq import Context, SimpleRetryMiddleware, TaskiqDepends
from taskiq.depends.progress_tracker import ProgressTracker, TaskState
from taskiq_pg.asyncpg import AsyncpgBroker

from taskiq_sa_pg import SQLAlchemyResultBackend, TaskMetadataMiddleware

dsn = os.environ["TASKIQ_SA_PG_DSN"]
payload: Any = os.environ["ACCEPTANCE_PAYLOAD"]
backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
    dsn, field_for_payload=payload, track="started"
)
broker = (
    AsyncpgBroker(dsn)
    .with_result_backend(backend)
    .with_middlewares(SimpleRetryMiddleware(default_retry_count=3), TaskMetadataMiddleware())
)


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


@broker.task
async def place(number: int, placed_at: datetime) -> Order:
    return Order(number=number, price=Decimal("9.90"), placed_at=placed_at)


@broker.task
def mirror(x: int, y: int) -> Point:
    return Point(y, x)


@broker.task
async def add(a: int, b: int) -> int:
    return a + b


@broker.task
async def pay() -> None:
    try:
        raise ConnectionError("the bank does not answer")
    except ConnectionError as exc:
        raise PaymentError(code=7) from exc


@broker.task
async def return_a_lambda() -> Any:
    return lambda: None


@broker.task
async def report(steps: int, tracker: ProgressTracker[int] = TaskiqDepends()) -> str:
    for step in range(steps):
        await tracker.set_progress(TaskState.STARTED, step)
    return "reported"


@broker.task(retry_on_error=True)
async def fail_until_attempt(attempt: int, context: Context = TaskiqDepends()) -> int:
    current = int(context.message.labels.get("_retries", 0))
    if current < attempt:
        raise RuntimeError(f"attempt {current}")
    return current


@broker.task
async def hold(gate: str) -> int:
    """Runs until there is progress of the gate."""
    async with aclosing(backend.watch_progress(gate)) as opened:
        async for _ in opened:
            break
    return os.getpid()
