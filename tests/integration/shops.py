"""An application whose orders and tasks are committed together, for the tests of sessions."""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from taskiq.decor import AsyncTaskiqDecoratedTask
from taskiq.kicker import AsyncKicker

from taskiq_sa_pg import SQLAlchemyBroker, build_models
from tests.conftest import Database, assert_nothing_checked_out, eventually


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


MODELS = build_models("shop", queue=True)

# Queues whose notifications come after all others; of one sender, PostgreSQL keeps their order.
_MARK = "the last of all "


def labelled(task: AsyncTaskiqDecoratedTask[Any, Any], **labels: Any) -> AsyncKicker[Any, Any]:
    """A kicker with labels; before taskiq 0.13 with_labels() changes those of the task."""
    kicker = task.kicker()
    kicker.labels = {**kicker.labels, **labels}
    return kicker


@dataclass
class Told:
    """Notifications of the queue: the names of queues, and by whom."""

    names: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)

    def hear(self, _connection: Any, pid: int, _channel: str, payload: str) -> None:
        self.names += json.loads(payload)
        self.pids.add(pid)


@dataclass
class Shop:
    """The tables, and what was opened on them.

    Attributes:
        driver: That of the asynchronous engines.
    """

    database: Database
    driver: str = "asyncpg"
    brokers: list[SQLAlchemyBroker] = field(default_factory=list)
    engines: list[AsyncEngine | Engine] = field(default_factory=list)

    async def create(self) -> None:
        await self.database.create()
        engine = self.engine()
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.run_sync(MODELS.metadata.create_all)
        await self.close()

    def dsn(self, drivername: str) -> str:
        """Past any pooler: transactions are what this is about."""
        return self.database.direct_dsn.replace("postgresql://", f"{drivername}://", 1)

    def broker(self, *args: Any, **kwargs: Any) -> SQLAlchemyBroker:
        """One that is not started, on the tables."""
        if not args and "engine" not in kwargs:
            args = (self.dsn(f"postgresql+{self.driver}"),)
        kwargs = {"models": MODELS, "check_schema": "off", **kwargs}
        return SQLAlchemyBroker(*args, **kwargs)

    async def start_broker(self) -> SQLAlchemyBroker:
        return await self.start(self.broker())

    async def start(self, broker: SQLAlchemyBroker) -> SQLAlchemyBroker:
        """Ends it with the shop."""
        await broker.startup()
        self.brokers.append(broker)
        return broker

    def engine(self, **kwargs: Any) -> AsyncEngine:
        """An application's own."""
        dsn = self.dsn("postgresql+psycopg")
        if self.driver == "asyncpg":  # which knows no `options`
            kwargs["connect_args"] = {"server_settings": {"search_path": self.database.schema}}
            dsn = self.database.server_dsn.replace("postgresql://", "postgresql+asyncpg://", 1)
        engine = create_async_engine(dsn, **kwargs)
        self.engines.append(engine)
        return engine

    def sync_engine(self, driver: str, **kwargs: Any) -> Engine:
        engine = create_engine(self.dsn(f"postgresql+{driver}"), **kwargs)
        self.engines.append(engine)
        return engine

    async def orders(self) -> list[int]:
        return [row[0] for row in await self.database.fetch("SELECT id FROM orders ORDER BY id")]

    async def queued(self) -> list[str]:
        query = "SELECT task_id FROM shop_queue ORDER BY queued_at, task_id"
        return [row[0] for row in await self.database.fetch(query)]

    @asynccontextmanager
    async def listening(self, broker: SQLAlchemyBroker) -> AsyncIterator[Told]:
        """What is told by a broker that is started, to the last when the block has ended."""
        told, mark = Told(), _MARK + uuid.uuid4().hex
        connection = await asyncpg.connect(self.database.direct_dsn)
        try:
            await connection.add_listener(MODELS.config.queue_channel, told.hear)
            yield told
            await packing(broker).kicker().with_labels(queue_name=mark).kiq(0)

            async def has_come() -> bool:
                return mark in told.names

            await eventually(has_come)
            told.names = [name for name in told.names if not name.startswith(_MARK)]
        finally:
            await connection.close()

    async def close(self) -> None:
        """Ends all that was opened, none of which may hold a connection."""
        for broker in self.brokers:
            await broker.shutdown()
        for engine in self.engines:
            if isinstance(engine, AsyncEngine):
                assert_nothing_checked_out(engine)
                await engine.dispose()
            else:
                assert engine.pool.status().count("Checked out connections: 0") == 1
                engine.dispose()
        self.brokers.clear()
        self.engines.clear()


def packing(broker: Any) -> AsyncTaskiqDecoratedTask[[int], Any]:
    """A task of a broker."""

    async def pack(order: int) -> str:
        return f"packed {order}"

    task: AsyncTaskiqDecoratedTask[[int], Any] = broker.register_task(pack, "pack")
    return task
