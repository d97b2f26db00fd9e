"""Checked by the type checker and never run: the public API as its users write it."""

from contextlib import aclosing, closing
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends, Request
from sqlalchemy import URL, ColumnElement, Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, scoped_session
from starlette.routing import Route
from taskiq import AsyncTaskiqTask, InMemoryBroker, TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import JSONSerializer

from taskiq_sa_pg import (
    Models,
    Page,
    ParkedTask,
    ProgressMixin,
    Pruned,
    QueueCount,
    ResultMixin,
    ScheduleInfo,
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    Stats,
    StatusMixin,
    StorageError,
    TableConfig,
    TaskDetails,
    TaskRecord,
    TaskStatus,
    WorkerInfo,
    WorkerMixin,
    build_models,
    make_task_id,
)
from taskiq_sa_pg.fastapi import task_router
from taskiq_sa_pg.starlette import task_routes
from taskiq_sa_pg.sync import SyncResults
from taskiq_sa_pg.testing import InProcessBroker


class Base(DeclarativeBase): ...


class Result(ResultMixin, Base):
    __table_config__ = TableConfig("orders_results", field_for_task_id="Uuid")
    tenant: Mapped[str | None]


class Progress(ProgressMixin, Base):
    __table_config__ = TableConfig("orders_results", field_for_task_id="Uuid")


class Status(StatusMixin, Base):
    __table_config__ = TableConfig("orders_results", field_for_task_id="Uuid")


class Worker(WorkerMixin, Base):
    __table_config__ = TableConfig("orders_results", field_for_task_id="Uuid")


def tenant_of(task_id: str, result: TaskiqResult[Any]) -> dict[str, str]:
    return {"tenant": result.labels["tenant"]}


async def tenant_from_afar(task_id: str, result: TaskiqResult[Any]) -> dict[str, str]:
    return tenant_of(task_id, result)


def arguments(engine: AsyncEngine) -> None:
    SQLAlchemyResultBackend[int]("postgresql://", True, "results", "Text", JSONSerializer())
    SQLAlchemyResultBackend[int](lambda: URL.create("postgresql"), pool_size=3)
    SQLAlchemyResultBackend[int]("postgresql://", notify=False, max_connections=2)
    SQLAlchemyResultBackend[int](engine=engine, listen_dsn=lambda: URL.create("postgresql"))
    models = Models(Result, Progress, Status, Worker=Worker)
    SQLAlchemyResultBackend[int](engine=engine, models=Models(Result, Progress), track="started")
    SQLAlchemyResultBackend[int](engine=engine, models=models)
    SQLAlchemyResultBackend[int](engine=engine, models=models, extra_values=tenant_of)
    SQLAlchemyResultBackend[int](engine=engine, models=models, extra_values=lambda *_: {})
    SQLAlchemyResultBackend[int](engine=engine, models=models, extra_values=tenant_from_afar)  # type: ignore[arg-type]  # async
    SQLAlchemyResultBackend[int](engine=engine, field_for_payload="Json")  # type: ignore[arg-type]  # no such type
    InMemoryBroker().with_result_backend(SQLAlchemyResultBackend("postgresql://"))
    assert_type(InMemoryBroker().with_id_generator(make_task_id), InMemoryBroker)


async def reading(backend: SQLAlchemyResultBackend[int], session: AsyncSession) -> None:
    assert_type(await backend.get_result("id"), TaskiqResult[int])
    assert_type(await backend.get_results(["id"]), dict[str, TaskiqResult[int]])
    assert_type(await backend.is_result_ready("id"), bool)
    assert_type(await backend.get_result(uuid4()), TaskiqResult[int])
    assert_type(await backend.get_results([uuid4()]), dict[UUID, TaskiqResult[int]])
    assert_type(await backend.get_result("id", return_type=str), TaskiqResult[str])
    assert_type(await backend.get_result("id", True, return_type=str | None), TaskiqResult[Any])
    models = build_models("results", metadata=Base.metadata)
    await session.scalars(select(models.Result.task_name).where(models.Result.is_err))


async def waiting(backend: SQLAlchemyResultBackend[int], task: AsyncTaskiqTask[str]) -> None:
    assert_type(await backend.wait_result("id", timeout=1), TaskiqResult[int])
    assert_type(await backend.wait_result(task), TaskiqResult[str])
    assert_type(await backend.wait_results(["id"], 1), list[TaskiqResult[int]])
    assert_type(await backend.wait_results([task]), list[TaskiqResult[str]])
    assert_type(await backend.wait_results([task, "id"]), list[TaskiqResult[Any]])
    async for one, result in backend.as_completed([task]):
        assert_type(one, AsyncTaskiqTask[str])
        assert_type(result, TaskiqResult[str])
    async for task_id, _ in backend.as_completed(["id"]):
        assert_type(task_id, str)
    async for a_uuid, _ in backend.as_completed([uuid4()], 1):
        assert_type(a_uuid, UUID)
    assert_type(await backend.wait_results([uuid4()]), list[TaskiqResult[int]])
    async for progress in backend.watch_progress(task, timeout=1):
        assert_type(progress, TaskProgress[Any])
    async with aclosing(backend.watch_progress("id")), aclosing(backend.as_completed(["id"])):
        pass


async def asking(backend: SQLAlchemyResultBackend[int], session: AsyncSession) -> None:
    models = backend.models
    assert_type(backend.decode((await session.execute(select(Result))).one()), TaskiqResult[Any])
    assert_type(
        backend.decode(await session.get_one(Result, "id"), with_logs=True).labels, dict[str, Any]
    )
    async for task_id, result in backend.iter_results(models.Result.is_err, batch_size=10):
        assert_type(task_id, str)
        assert_type(result, TaskiqResult[int])
    where = [~models.Result.is_expired, Result.tenant == "acme", Result.duration > timedelta(1)]
    async with aclosing(backend.iter_results(where=where, order_by=Result.duration.desc())):
        pass
    backend.iter_results(order_by=[Result.finished_at, Result.waited.desc()])
    backend.iter_results(True)  # type: ignore[arg-type]  # no condition
    assert_type(await backend.forget(["id"]), int)
    page = await backend.find(where, window=timedelta(1), outcome="failed", argument={0: 1})
    assert_type(page.records[0], TaskRecord)
    assert_type(await backend.find(after=page.next, label={"user": 42}), Page)
    await backend.find(outcome="success")  # type: ignore[arg-type]  # it is "succeeded"
    assert_type(await backend.get_details("id", with_result=True), TaskDetails)


async def tending(backend: SQLAlchemyResultBackend[int]) -> None:
    assert_type(await backend.get_status("id"), TaskStatus)
    assert_type(await backend.get_running(limit=10), list[TaskStatus])
    assert_type(await backend.get_workers(), list[WorkerInfo])
    assert_type(await backend.resend(InMemoryBroker(), uuid4()), AsyncTaskiqTask[Any])
    assert_type(await backend.prune(limit=10, time_budget=timedelta(minutes=1)), Pruned)
    assert_type(backend.stats(), Stats)


def properties(result: Result) -> None:
    assert_type(result.is_expired, bool)
    assert_type(result.duration, timedelta)
    assert_type(result.waited, timedelta | None)


def errors(error: StorageError) -> None:
    assert_type(error.sqlstate, str | None)


broker = SQLAlchemyBroker("postgresql://", models=build_models(queue=True), queue_name="mail")
mail: SQLAlchemyBroker = broker.listening_to("mail", "letters")


@broker.task
async def pack(order: int, *, fast: bool = False) -> str:
    return f"{order} {fast}"


@broker.task(priority=3)
def count(orders: list[int]) -> int:
    return len(orders)


async def sending(session: AsyncSession) -> None:
    in_session = broker.in_session(session)
    assert_type(await in_session.kiq(pack, 1, fast=True), AsyncTaskiqTask[str])
    assert_type(await in_session.kiq(count, [1]), AsyncTaskiqTask[int])
    kicker = pack.kicker().with_labels(delay=3, queue_name="mail").with_task_id("one")
    assert_type(await in_session.kiq(kicker, 1), AsyncTaskiqTask[str])
    assert_type(await in_session.kiq(count.kicker(), [1]), AsyncTaskiqTask[int])
    assert_type(await kicker.with_broker(in_session).kiq(1), AsyncTaskiqTask[str])
    await in_session.kiq(pack, "one")  # type: ignore[call-overload]
    await in_session.kiq(pack)  # type: ignore[call-overload]
    await in_session.kiq(kicker, 1, slow=True)  # type: ignore[call-arg]
    await in_session.kiq(count, 1)  # type: ignore[call-overload]


async def administering() -> None:
    assert_type(await broker.get_queues(limit=100), list[QueueCount])
    assert_type(await mail.get_parked("mail", "pack", 3), list[ParkedTask])
    assert_type(await broker.release_parked(queue_name="mail"), int)
    assert_type(await broker.discard_parked(["one", UUID(int=2)]), int)
    assert_type(await broker.get_schedules(), list[ScheduleInfo])
    await broker.release_parked("mail", "pack")  # type: ignore[call-arg]  # a name is no list of ids


def sending_sync(
    session: Session,
    scoped: scoped_session[Session],
    async_scoped: async_scoped_session[AsyncSession],
    engine: Engine,
) -> None:
    in_session = broker.in_session(session)
    assert_type(in_session.kiq_sync(pack, 1, fast=True), AsyncTaskiqTask[str])
    assert_type(in_session.kiq_sync(count.kicker(), [1]), AsyncTaskiqTask[int])
    in_session.kiq_sync(pack, "one")  # type: ignore[call-overload]
    in_session.kiq_sync(count)  # type: ignore[call-overload]
    mail.in_session(scoped).kiq_sync(pack, 1)
    mail.in_session(async_scoped)
    broker.in_session(engine)  # type: ignore[arg-type]


async def testing(session: AsyncSession, is_test: bool) -> None:
    in_process = InProcessBroker(await_inplace=True, max_async_tasks=3)
    assert_type(await in_process.in_session(session).kiq(pack, 1), AsyncTaskiqTask[str])
    either = in_process if is_test else broker
    await either.in_session(session).kiq(pack, 1)
    either.listening_to("mail")
    await in_process.wait_all()


def may_see(request: Request, task_id: str) -> bool:
    return bool(task_id)


async def may_see_async(request: Request, task_id: str) -> bool:
    return bool(task_id)


async def may_list(request: Request) -> bool | ColumnElement[bool]:
    return Result.tenant == request.headers["tenant"]


def serving(backend: SQLAlchemyResultBackend[int]) -> None:
    router = task_router(backend, may_see=may_see, dependencies=[Depends(may_see)])
    assert_type(router, APIRouter)
    task_router(backend, may_see=may_see_async, may_list=may_list, unknown="pending")
    routes = task_routes(backend, may_see=may_see, may_list=lambda request: Result.is_err)
    assert_type(routes, list[Route])
    task_router(broker)  # type: ignore[arg-type]
    task_router(backend, unknown="404")  # type: ignore[arg-type]
    task_routes(backend, may_see=lambda task_id: True)  # type: ignore[arg-type, misc]


def synchronously(backend: SQLAlchemyResultBackend[int], task: AsyncTaskiqTask[str]) -> None:
    assert_type(SyncResults(broker), SyncResults[Any])
    with SyncResults(backend) as results:
        assert_type(results, SyncResults[int])
    assert_type(results.kiq(pack, 1, fast=True), AsyncTaskiqTask[str])
    assert_type(results.kiq(count.kicker().with_labels(priority=9), [1]), AsyncTaskiqTask[int])
    results.kiq(pack, "one")  # type: ignore[call-overload]
    results.kiq(count)  # type: ignore[call-overload]
    assert_type(results.get_result("id"), TaskiqResult[int])
    assert_type(results.get_result(uuid4(), return_type=str), TaskiqResult[str])
    assert_type(results.get_results([uuid4()]), dict[UUID, TaskiqResult[int]])
    assert_type(results.wait_result("id", timeout=1), TaskiqResult[int])
    assert_type(results.wait_result(task), TaskiqResult[str])
    assert_type(results.wait_results([task], 1), list[TaskiqResult[str]])
    assert_type(results.wait_results([task, "id"]), list[TaskiqResult[Any]])
    for one, result in results.as_completed([task]):
        assert_type(one, AsyncTaskiqTask[str])
        assert_type(result, TaskiqResult[str])
    for progress in results.watch_progress(task, timeout=1):
        assert_type(progress, TaskProgress[Any])
    with closing(results.watch_progress("id")), closing(results.as_completed(["id"])):
        pass
    assert_type(results.get_status("id"), TaskStatus)
    assert_type(results.find(label={"user": 42}), Page)
    assert_type(results.get_details("id"), TaskDetails)
    assert_type(results.call(backend.prune, limit=10), Pruned)
    results.call(backend.prune, limits=10)  # type: ignore[call-arg]
    SyncResults("postgresql://")  # type: ignore[call-overload]
