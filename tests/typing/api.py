"""Checked by the type checker and never run: the public API as its users write it."""

from typing import assert_type

from sqlalchemy import URL, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped
from taskiq import InMemoryBroker, TaskiqResult
from taskiq.serializers import JSONSerializer

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultMixin,
    SQLAlchemyResultBackend,
    StorageError,
    TableConfig,
    build_models,
)


class Base(DeclarativeBase): ...


class Result(ResultMixin, Base):
    __table_config__ = TableConfig("orders_results", field_for_task_id="Uuid")
    tenant: Mapped[str | None]


class Progress(ProgressMixin, Base):
    __table_config__ = TableConfig("orders_results", field_for_task_id="Uuid")


def arguments(engine: AsyncEngine) -> None:
    SQLAlchemyResultBackend[int]("postgresql://", True, "results", "Text", JSONSerializer())
    SQLAlchemyResultBackend[int](lambda: URL.create("postgresql"), pool_size=3)
    SQLAlchemyResultBackend[int](engine=engine, models=Models(Result, Progress))
    SQLAlchemyResultBackend[int](engine=engine, field_for_payload="Json")  # type: ignore[arg-type]  # no such type
    InMemoryBroker().with_result_backend(SQLAlchemyResultBackend("postgresql://"))


async def reading(backend: SQLAlchemyResultBackend[int], session: AsyncSession) -> None:
    assert_type(await backend.get_result("id"), TaskiqResult[int])
    assert_type(await backend.get_results(["id"]), dict[str, TaskiqResult[int]])
    assert_type(await backend.is_result_ready("id"), bool)
    models = build_models("results", metadata=Base.metadata)
    await session.scalars(select(models.Result.task_name).where(models.Result.is_err))


def errors(error: StorageError) -> None:
    assert_type(error.sqlstate, str | None)
