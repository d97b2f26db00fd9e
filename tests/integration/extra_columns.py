"""An application with columns of its own of every type in the results table."""

import asyncio
import enum
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultMixin,
    SQLAlchemyResultBackend,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database
from tests.integration.databases import Log, address
from tests.tasks import result_of

Backend = SQLAlchemyResultBackend[Any]

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


class Colour(enum.Enum):
    """Stored by name."""

    RED = 1
    BLUE = 2


class Reversed(sa.types.TypeDecorator[str]):
    """A type of the application's."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, _: Any) -> str | None:
        return value if value is None else value[::-1]

    def process_result_value(self, value: str | None, _: Any) -> str | None:
        return value if value is None else value[::-1]


class Upper(sa.types.UserDefinedType[str]):
    """A type that wraps its values in a function of SQL."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "TEXT"

    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.func.upper(sa.type_coerce(bindvalue, sa.Text))


def new_models() -> Models:
    """Models with columns of their own, on a Base of their own."""

    class Base(DeclarativeBase): ...

    class Tenant(Base):
        __tablename__ = "tenants"
        name: Mapped[str] = mapped_column(primary_key=True)

    class Result(ResultMixin, Base):
        tenant: Mapped[str | None] = mapped_column(
            'Tenant "Ä" (100%) :x', sa.ForeignKey(Tenant.name)
        )
        region: Mapped[str] = mapped_column(sa.String(8), server_default="nowhere")
        colour: Mapped[Colour | None]
        details: Mapped[Any | None] = mapped_column(postgresql.JSONB)
        plain_json: Mapped[Any | None] = mapped_column(sa.JSON(none_as_null=True))
        order_id: Mapped[uuid.UUID | None]
        order_text: Mapped[str | None] = mapped_column(sa.Uuid(as_uuid=False))
        price: Mapped[Decimal | None] = mapped_column(sa.Numeric(10, 2))
        count: Mapped[int | None]
        day: Mapped[date | None]
        at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
        span: Mapped[timedelta | None]
        is_test: Mapped[bool | None]
        blob: Mapped[bytes | None]
        reversed: Mapped[str | None] = mapped_column(Reversed)
        tags: Mapped[list[str] | None] = mapped_column(postgresql.ARRAY(sa.Text))
        upper: Mapped[str | None] = mapped_column(Upper)
        size: Mapped[int | None] = mapped_column(
            sa.Computed("length(return_value)", persisted=True)
        )
        number: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True))

    class Progress(ProgressMixin, Base):
        stage: Mapped[str] = mapped_column(server_default="early")

    return Models(Result, Progress)


VALUES: dict[str, Any] = {
    "tenant": "acme",
    "region": "north",
    "colour": Colour.BLUE,
    "details": {"a": [1, None, "ü'\\"], "b": None},
    "plain_json": ["x", {"y": 1}],
    "order_id": uuid.UUID(int=7),
    "order_text": str(uuid.UUID(int=8)),
    "price": Decimal("12.50"),
    "count": -3,
    "day": NOW.date(),
    "at": NOW,
    "span": timedelta(days=1, microseconds=5),
    "is_test": True,
    "blob": b"\x00\xff",
    "reversed": "abc",
    "tags": ["a", 'b,"{}'],
    "upper": "abc",
}


@dataclass
class Application:
    """An application's tables and engine, and what it starts backends with."""

    models: Models
    engine: AsyncEngine
    log: Log
    start_backend: BackendFactory

    async def start(self, function: Callable[..., Any] | None, **arguments: Any) -> Backend:
        backend: Backend = await self.start_backend(
            engine=self.engine,
            models=self.models,
            extra_values=function,
            **{"run_migrations": False, "notify": False, **arguments},
        )
        return backend

    async def start_with(self, values: Mapping[str, Mapping[str, Any]]) -> Backend:
        """A backend that knows the values for each task id."""
        return await self.start(lambda task_id, _: values[task_id])

    async def execute(self, *statements: Any) -> None:
        async with self.engine.begin() as connection:
            for statement in statements:
                await connection.execute(
                    sa.text(statement) if isinstance(statement, str) else statement
                )

    async def stored(self, *names: str) -> dict[str, Any]:
        """What is stored in these attributes, by task id."""
        result: Any = self.models.Result
        columns = [getattr(result, name) for name in names]
        async with AsyncSession(self.engine) as session:
            rows = (await session.execute(sa.select(result.task_id, *columns))).all()
        return {row[0]: row[1] if len(names) == 1 else tuple(row[1:]) for row in rows}


async def open_application(
    database: Database, driver: str, start_backend: BackendFactory
) -> Application:
    """With its tables, in which there are two tenants; the log is for asyncpg alone."""
    log, engine, models = Log(), make_engine(address(database, driver)), new_models()
    if driver == "asyncpg":
        sa.event.listen(engine.sync_engine, "connect", log.attach)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
        tenants = models.metadata.tables["tenants"]
        await connection.execute(sa.insert(tenants), [{"name": "acme"}, {"name": "other"}])
    return Application(models, engine, log, start_backend)


each_driver = pytest.mark.parametrize("application", ["asyncpg", "psycopg"], indirect=True)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


async def store(backend: Backend, *task_ids: str, **fields: Any) -> None:
    await asyncio.gather(*[backend.set_result(i, result_of(i, **fields)) for i in task_ids])


async def returned(backend: Backend, *task_ids: str) -> list[Any]:
    return [(await backend.get_result(task_id)).return_value for task_id in task_ids]
