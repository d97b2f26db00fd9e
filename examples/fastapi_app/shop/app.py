"""The web application. `uvicorn shop.app:app` serves it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from shop.admin import admin
from shop.database import Session, engine, get_session
from shop.models import Order, Result
from shop.tasks import backend, broker, pack
from taskiq_sa_pg import ResultMixin
from taskiq_sa_pg.fastapi import TaskError, task_router


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()
    await engine.dispose()


app = FastAPI(title="Shop", lifespan=lifespan)

SessionOfRequest = Annotated[AsyncSession, Depends(get_session)]


class NewOrder(BaseModel):
    customer: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00]*$")
    quantity: int = Field(ge=1, le=100)


class Accepted(BaseModel):
    order_id: int
    task_id: UUID


class OrderStatus(BaseModel):
    order_id: int
    task_id: UUID
    customer: str
    quantity: int
    ordered_at: datetime
    state: Literal["pending", "succeeded", "failed"] = "pending"
    value: Any = None
    error: TaskError | None = None


async def is_of_an_order(request: Request, task_id: str) -> bool:
    # Check here whose order it is. The session is closed before an event stream begins.
    async with Session() as session:
        order = select(Order.id).where(Order.task_id == UUID(task_id))
        return await session.scalar(order) is not None


app.include_router(task_router(backend, may_see=is_of_an_order), prefix="/tasks", tags=["tasks"])
app.mount("/admin", admin)


@app.get("/", include_in_schema=False)
async def show_page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))


@app.post("/orders", status_code=202)
async def place_order(
    new: NewOrder, session: SessionOfRequest, request: Request, response: Response
) -> Accepted:
    order = Order(task_id=uuid4(), customer=new.customer, quantity=new.quantity)
    session.add(order)
    await session.flush()  # sets order.id
    packing = pack.kicker().with_task_id(str(order.task_id))
    await broker.in_session(session).kiq(packing, order.id)
    await session.commit()  # the order and its task, or neither
    response.headers["Location"] = request.url_for("get_task", task_id=order.task_id).path
    return Accepted(order_id=order.id, task_id=order.task_id)


@app.get("/orders")
async def list_orders(
    session: SessionOfRequest, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> list[OrderStatus]:
    latest = (
        select(Order, Result)
        .outerjoin(Result, Result.task_id == Order.task_id)
        .order_by(Order.id.desc())
        .limit(limit)
    )
    return [to_status(order, row) for order, row in await session.execute(latest)]


def to_status(order: Order, row: ResultMixin | None) -> OrderStatus:
    status = OrderStatus(
        order_id=order.id,
        task_id=order.task_id,
        customer=order.customer,
        quantity=order.quantity,
        ordered_at=order.ordered_at,
    )
    if row is None:
        return status
    result = backend.decode(row)
    if result.error is None:
        return status.model_copy(update={"state": "succeeded", "value": result.return_value})
    error = TaskError(type=type(result.error).__name__, message=str(result.error))
    return status.model_copy(update={"state": "failed", "error": error})
