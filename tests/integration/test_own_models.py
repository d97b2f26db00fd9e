"""Models on the application's Base, in its queries and relationships, under its engine."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultMixin,
    SQLAlchemyResultBackend,
    StorageError,
    TableConfig,
    build_models,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]


@pytest.fixture(params=["asyncpg", "psycopg"])
async def engine(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(database.dsn if request.param == "asyncpg" else database.psycopg_dsn)
    yield engine
    await engine.dispose()


def models_by_mixins() -> tuple[Models, list[Any]]:
    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        __table_config__ = TableConfig('Odd "résults" 100%', "Uuid", "Jsonb")
        tenant_id: Mapped[int | None] = mapped_column(sa.ForeignKey("tenants.id"))
        tenant: Mapped["Tenant | None"] = relationship(back_populates="results")
        orders: Mapped[list["Order"]] = relationship(back_populates="result")

    class Progress(ProgressMixin, Base):
        __table_config__ = Result.__table_config__

    # The results' model refers to classes that come after it.
    models = Models(Result, Progress)
    backend: Backend = SQLAlchemyResultBackend(
        "postgresql://nowhere", models=models, extra_values=lambda *_: {}
    )
    assert backend.models is models

    class Tenant(Base):
        __tablename__ = "tenants"
        id: Mapped[int] = mapped_column(primary_key=True)
        results: Mapped[list[Result]] = relationship(back_populates="tenant")

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        task_id: Mapped[Any] = mapped_column(
            sa.ForeignKey(Result.task_id, ondelete="SET NULL"), nullable=True
        )
        result: Mapped[Result | None] = relationship(back_populates="orders")

    return models, [Order, Tenant]


def models_by_function() -> tuple[Models, list[Any]]:
    class Base(DeclarativeBase): ...

    models = build_models('Odd "résults" 100%', field_for_task_id="Uuid", metadata=Base.metadata)

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        task_id: Mapped[Any] = mapped_column(
            sa.ForeignKey(models.Result.task_id, ondelete="SET NULL"), nullable=True
        )
        result: Mapped[Any] = relationship(models.Result, backref="orders")

    return models, [Order]


TASK_ID = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


@pytest.mark.parametrize("make_models", [models_by_mixins, models_by_function])
async def test_a_table_of_theirs_refers_to_results_and_back(
    engine: AsyncEngine, start_backend: BackendFactory, make_models: Any
) -> None:
    models, others = make_models()
    Order: Any = others[0]  # noqa: N806 - it is a class
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    backend: Backend = await start_backend(engine=engine, models=models, run_migrations=False)
    await backend.set_result(TASK_ID, result_of(7))
    await backend.set_progress(TASK_ID, progress_of("half"))
    assert (await backend.get_result(TASK_ID)).return_value == 7
    Result: Any = models.Result  # noqa: N806 - as above
    async with AsyncSession(engine) as session:
        result = (await session.scalars(sa.select(Result))).one()
        session.add(Order(id=1, result=result))
        await session.commit()
        joined = (
            sa.select(Order.id, Result.execution_time)
            .join(Order.result)
            .where(Result.is_err.is_(False))
        )
        assert (await session.execute(joined)).all() == [(1, 0.25)]
        loaded = (
            await session.scalars(sa.select(Result).options(selectinload(Result.orders)))
        ).one()
        assert [order.id for order in loaded.orders] == [1]
        order = (await session.scalars(sa.select(Order).options(selectinload(Order.result)))).one()
        assert str(order.result.task_id) == TASK_ID
    await backend.set_result(TASK_ID, result_of(8))
    taking: Backend = await start_backend(
        engine=engine, models=models, run_migrations=False, keep_results=False
    )
    assert (await taking.get_result(TASK_ID)).return_value == 8
    async with AsyncSession(engine) as session:
        assert (await session.scalars(sa.select(Order.task_id))).all() == [None]


async def test_a_relationship_without_a_constraint_may_come_before_the_result(
    engine: AsyncEngine, start_backend: BackendFactory
) -> None:
    """As for a task that still runs."""

    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        order: Mapped["Order | None"] = relationship(
            primaryjoin="foreign(Order.task_id) == Result.task_id",
            back_populates="result",
            viewonly=True,
        )

    class Progress(ProgressMixin, Base): ...

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        task_id: Mapped[str]
        result: Mapped[Result | None] = relationship(
            primaryjoin="foreign(Order.task_id) == Result.task_id",
            back_populates="order",
            viewonly=True,
        )

    models = Models(Result, Progress)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    backend: Backend = await start_backend(engine=engine, models=models, run_migrations=False)
    unfinished = sa.select(Order.id).outerjoin(Order.result).where(Result.task_id.is_(None))
    async with AsyncSession(engine) as session:
        session.add(Order(id=1, task_id="1"))
        await session.commit()
        assert (await session.scalars(unfinished)).all() == [1]
        await backend.set_result("1", result_of(7))
        assert (await session.scalars(unfinished)).all() == []
        result = (
            await session.scalars(sa.select(Result).options(selectinload(Result.order)))
        ).one()
        assert result.order is not None
        assert result.order.id == 1


async def test_a_result_that_a_row_of_theirs_holds_on_to_is_not_taken(
    engine: AsyncEngine, start_backend: BackendFactory
) -> None:
    """Without ON DELETE; and it stays readable."""

    class Base(DeclarativeBase): ...

    models = build_models(metadata=Base.metadata)
    holders = sa.Table(
        "holders", Base.metadata, sa.Column("task_id", sa.ForeignKey("taskiq_results.task_id"))
    )
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    backend: Backend = await start_backend(
        engine=engine, models=models, run_migrations=False, keep_results=False
    )
    await backend.set_result("1", result_of(7))
    async with engine.begin() as connection:
        await connection.execute(sa.insert(holders).values(task_id="1"))
    with pytest.raises(StorageError, match="violates foreign key constraint"):
        await backend.get_result("1")
    async with engine.begin() as connection:
        await connection.execute(sa.delete(holders))
    assert (await backend.get_result("1")).return_value == 7
