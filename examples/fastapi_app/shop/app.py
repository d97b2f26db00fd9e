"""The web application. `uvicorn shop.app:app` serves it."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import TaskiqResult

from shop.database import engine, get_session
from shop.models import Order, Result
from shop.tasks import backend, broker, pack
from taskiq_sa_pg import ResultIsMissingError, StorageError

logger = logging.getLogger(__name__)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()
    await engine.dispose()


app = FastAPI(title="Shop", lifespan=lifespan)

# Closed before the response is sent: an event stream would keep its connection for minutes.
SessionOfRequest = Annotated[AsyncSession, Depends(get_session, scope="function")]


class NewOrder(BaseModel):
    customer: str = Field(min_length=1, max_length=100, pattern=r"^[^\x00]*$")
    quantity: int = Field(ge=1, le=100)


class Accepted(BaseModel):
    order_id: int
    task_id: UUID


class TaskError(BaseModel):
    type: str
    message: str


class TaskStatus(BaseModel):
    state: Literal["running", "succeeded", "failed"]
    value: Any = None
    error: TaskError | None = None


class Failure(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    order_id: int
    task_id: UUID
    customer: str
    quantity: int
    error_type: str | None
    finished_at: datetime


def to_status(result: TaskiqResult[Any]) -> TaskStatus:
    if result.error is None:
        return TaskStatus(state="succeeded", value=result.return_value)
    error = TaskError(type=type(result.error).__name__, message=str(result.error))
    return TaskStatus(state="failed", error=error)


async def find_order(task_id: UUID, session: SessionOfRequest) -> Order:
    order = await session.scalar(select(Order).where(Order.task_id == task_id))
    if order is None:
        raise HTTPException(404, f"no order has the task {task_id}")
    return order


OrderOfTask = Annotated[Order, Depends(find_order)]


@app.get("/", include_in_schema=False)
async def show_page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))


@app.post("/orders", status_code=202)
async def place_order(
    new: NewOrder, session: SessionOfRequest, request: Request, response: Response
) -> Accepted:
    order = Order(task_id=uuid4(), customer=new.customer, quantity=new.quantity)
    session.add(order)
    await session.flush()  # which gives the order its id
    packing = pack.kicker().with_task_id(str(order.task_id))
    await broker.in_session(session).kiq(packing, order.id)
    await session.commit()  # the order and its task, or neither
    response.headers["Location"] = request.url_for("get_task", task_id=order.task_id).path
    return Accepted(order_id=order.id, task_id=order.task_id)


@app.get("/tasks/{task_id}", responses={202: {"model": TaskStatus}})
async def get_task(order: OrderOfTask, response: Response) -> TaskStatus:
    try:
        return to_status(await backend.get_result(str(order.task_id)))
    except ResultIsMissingError:
        response.status_code = 202
        return TaskStatus(state="running")


@app.get("/tasks/{task_id}/events", response_class=EventSourceResponse)
async def stream_events(order: OrderOfTask) -> AsyncIterator[ServerSentEvent]:
    task_id = str(order.task_id)
    async with aclosing(backend.watch_progress(task_id)) as changes:
        async for progress in changes:
            yield ServerSentEvent(event="progress", data=progress.meta)
    result = await backend.get_result(task_id)
    yield ServerSentEvent(event="result", data=to_status(result))


@app.get("/failures")
async def list_failures(
    session: SessionOfRequest, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> list[Failure]:
    failures = (
        select(
            Order.id.label("order_id"),
            Order.task_id,
            Order.customer,
            Order.quantity,
            Result.error_type,
            Result.finished_at,
        )
        .join(Result, Result.task_id == Order.task_id)
        .where(Result.is_err)
        .order_by(Result.finished_at.desc())
        .limit(limit)
    )
    return [Failure.model_validate(row) for row in await session.execute(failures)]


@app.exception_handler(StorageError)
async def say_unavailable(request: Request, exc: StorageError) -> JSONResponse:
    logger.error("%s %s: %s", request.method, request.url.path, exc)
    return JSONResponse({"detail": "the results cannot be read now"}, status_code=503)
