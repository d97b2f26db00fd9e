"""The shop's task: `taskiq worker shop.tasks:broker` runs it."""

import asyncio
import logging
from typing import Any

from pydantic import BaseModel
from taskiq import TaskiqDepends, TaskiqEvents, TaskiqState
from taskiq.depends.progress_tracker import ProgressTracker, TaskState

from shop.database import Session, engine
from shop.models import Order, task_models
from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend, TaskMetadataMiddleware

STOCK = 10
SECONDS_PER_ITEM = 0.25

backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
    engine=engine, models=task_models, track="started"
)
broker = (
    SQLAlchemyBroker(engine=engine, models=task_models)
    .with_result_backend(backend)
    .with_middlewares(TaskMetadataMiddleware(record_args=True))
)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def set_up_log(state: TaskiqState) -> None:
    # taskiq does this only for forked workers; with Python 3.14 they are not forked.
    logging.basicConfig(level=logging.INFO)


class Parcel(BaseModel):
    label: str
    items: int


class OutOfStockError(Exception):
    pass


@broker.task
async def pack(order_id: int, tracker: ProgressTracker[dict[str, int]] = TaskiqDepends()) -> Parcel:
    async with Session() as session:
        order = await session.get_one(Order, order_id)
    for packed in range(order.quantity):
        await tracker.set_progress(TaskState.STARTED, {"packed": packed, "ordered": order.quantity})
        if packed == STOCK:
            raise OutOfStockError(f"{order.quantity} ordered, and only {STOCK} in stock")
        await asyncio.sleep(SECONDS_PER_ITEM)
    return Parcel(label=f"No. {order.id} for {order.customer}", items=order.quantity)
