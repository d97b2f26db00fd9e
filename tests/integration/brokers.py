"""What the tests of the broker share: brokers on common tables, and hands that take tasks."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import AckableMessage, AsyncBroker, AsyncResultBackend
from taskiq.kicker import AsyncKicker
from taskiq.receiver import Receiver

from taskiq_sa_pg import Models, SQLAlchemyBroker, SQLAlchemyResultBackend, build_models
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.exceptions import NotStartedError
from taskiq_sa_pg.models import TaskIdField
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings
from tests.conftest import Database, assert_nothing_checked_out, eventually
from tests.integration.databases import assert_disconnected
from tests.tasks import new_id

# For what comes at once; what does not come fails its test after this.
SOON: Final = 5.0

# Nobody polls: what wakes a worker is a notification.
UNPOLLED: Final = Timings(between_polls=600, between_unheard_polls=600)

# Nobody gives back what was claimed.
PATIENT: Final = replace(UNPOLLED, unused_claim=600)

# Each driver on its own engine and on one of the application's, by turns.
PAIRS: Final = [("asyncpg", "owned"), ("psycopg", "borrowed")]

# Its channel is nobody else's: channels belong to the whole database.
_TABLE: Final = f"broker_{os.getpid()}_{new_id()[:8]}"


@lru_cache
def models_of(kind: TaskIdField = "VarChar") -> Models:
    """To make them takes longer than most tests."""
    return build_models(table_name=f"{_TABLE}_{kind}", field_for_task_id=kind, queue=True)


async def make_tables(database: Database, *kinds: TaskIdField) -> None:
    engine = make_engine(database.direct_dsn)
    try:
        async with engine.begin() as connection:
            for kind in kinds:
                await connection.run_sync(models_of(kind).metadata.create_all)
    finally:
        await engine.dispose()


class Brokers:
    """Brokers of one test, whose sessions have a name of their own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.driver, self.owner = PAIRS[0]
        self.name = f"broker_{new_id()}"
        self._made: list[SQLAlchemyBroker] = []
        self._engines: list[AsyncEngine] = []
        self._kinds: set[TaskIdField] = set()

    def dsn(self) -> str:
        return f"{self.database.dsn_of(self.driver)}&application_name={self.name}"

    def direct_dsn(self) -> str:
        """The same past any pooler, which would not let notifications through."""
        dsn = self.database.direct_dsn
        if self.driver == "psycopg":
            dsn = dsn.replace("postgresql:", "postgresql+psycopg:", 1)
        return f"{dsn}&application_name={self.name}"

    def engine(self, **arguments: Any) -> AsyncEngine:
        """One of the application's, in which nothing may be in use at the end."""
        self._engines.append(make_engine(self.dsn(), **arguments))
        return self._engines[-1]

    def make(
        self,
        *,
        field_for_task_id: TaskIdField = "VarChar",
        results: AsyncResultBackend[Any] | bool = False,
        timings: Timings = DEFAULT_TIMINGS,
        **kwargs: Any,
    ) -> SQLAlchemyBroker:
        """A broker with a task `task`; with `results=True` a result backend shares its database."""
        self._kinds.add(field_for_task_id)
        models = models_of(field_for_task_id)
        place: dict[str, Any] = {"models": models, "check_schema": "off"}
        if "engine" not in kwargs and "dsn" not in kwargs:
            is_owned = self.owner == "owned"
            place |= {"dsn": self.dsn()} if is_owned else {"engine": self.engine()}
        if self.database.is_deaf and kwargs.get("notify", True):
            place["listen_dsn"] = self.direct_dsn()
        broker = SQLAlchemyBroker(**{**place, **kwargs})
        broker.settings = replace(broker.settings, timings=timings)
        if results is True:
            known = {"dsn", "engine", "models", "check_schema", "listen_dsn", "notify"}
            chosen = {name: value for name, value in {**place, **kwargs}.items() if name in known}
            backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(**chosen)
            backend.settings = replace(backend.settings, timings=timings)
            broker.with_result_backend(backend)
        elif results:
            broker.with_result_backend(results)
        broker.register_task(_nothing, task_name="task")
        self._made.append(broker)
        return broker

    async def start(self, **kwargs: Any) -> SQLAlchemyBroker:
        broker = self.make(**kwargs)
        await broker.startup()
        return broker

    @property
    def queue(self) -> str:
        """The queue's table, in SQL."""
        return f'"{models_of().config.queue_table_name}"'

    async def rows(self, kind: TaskIdField = "VarChar") -> list[asyncpg.Record]:
        """The queue, in the order in which tasks were sent."""
        table = models_of(kind).config.queue_table_name
        return await self.database.fetch(f'SELECT * FROM "{table}" ORDER BY queued_at, task_id')

    async def change(self, assignments: str, condition: str = "true") -> None:
        """Changes the queue's rows, as time or another worker would."""
        await self.database.fetch(f"UPDATE {self.queue} SET {assignments} WHERE {condition}")

    async def expire(self) -> None:
        """Ends every lease and delay."""
        await self.change("available_at = now()", "available_at < 'infinity'")

    async def seconds_until_due(self, task_id: str) -> float:
        """In how many seconds a worker may take it, by the database's clock."""
        seconds = "extract(epoch FROM available_at - now())::float8 AS seconds"
        query = f"SELECT {seconds} FROM {self.queue} WHERE task_id = $1"
        [row] = await self.database.fetch(query, task_id)
        return float(row["seconds"])

    async def sessions(self) -> int:
        return len(await self.database.sessions(self.name))

    async def listening(self) -> list[int]:
        """The server processes that serve the listening connections."""
        rows = await self.database.fetch(
            "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND query ~ '^LISTEN'",
            self.name,
        )
        return [row["pid"] for row in rows]

    async def close(self) -> None:
        """Shuts all down: none may hold a connection, and no session may be left."""
        for broker in self._made:
            if is_started(broker):
                await assert_comes_to_rest(broker)
                await broker.shutdown()
        for engine in self._engines:
            assert_nothing_checked_out(engine)
            await engine.dispose()
        await assert_disconnected(self.database, self.name)
        for kind in self._kinds:
            config = models_of(kind).config
            names = ", ".join(f'"{n}"' for n in (config.table_name, config.queue_table_name))
            await self.database.fetch(f"TRUNCATE {names}")


async def _nothing(*_: Any) -> None: ...


def is_started(broker: SQLAlchemyBroker) -> bool:
    try:
        return broker.runtime is not None
    except NotStartedError:
        return False


async def assert_comes_to_rest(broker: SQLAlchemyBroker) -> None:
    """Nothing runs, and only connections of the broker's own engine are kept for the next."""
    database = broker.runtime.database

    async def is_at_rest() -> bool:
        pool = database.engine.pool
        is_kept = database.kept == 0 or database.is_owned
        return is_kept and isinstance(pool, sa.QueuePool) and pool.checkedout() == database.kept

    await eventually(is_at_rest)


async def send(broker: AsyncBroker, task_id: str = "", name: str = "task", **labels: Any) -> str:
    """Sends a task, with these labels."""
    kicker: AsyncKicker[Any, Any] = AsyncKicker(name, broker, labels)
    task = await kicker.with_task_id(task_id or new_id()).kiq()
    return task.task_id


@asynccontextmanager
async def listening(broker: SQLAlchemyBroker) -> AsyncIterator[AsyncGenerator[Any, None]]:
    messages = broker.listen()
    try:
        yield messages
    finally:
        await messages.aclose()


async def take(messages: AsyncGenerator[Any, None], count: int = 1) -> list[AckableMessage]:
    async with asyncio.timeout(SOON):
        return [await anext(messages) for _ in range(count)]


def id_of(broker: AsyncBroker, message: AckableMessage) -> str:
    return broker.formatter.loads(message.data).task_id


@asynccontextmanager
async def hungry(broker: SQLAlchemyBroker) -> AsyncIterator[asyncio.Task[Any]]:
    """The next task of a worker, which may never come."""
    messages = broker.listen()
    coming: asyncio.Task[Any] = asyncio.ensure_future(anext(messages))
    try:
        yield coming
    finally:
        coming.cancel()
        await asyncio.wait([coming])
        await messages.aclose()


async def take_ids(
    broker: SQLAlchemyBroker, messages: AsyncGenerator[Any, None], count: int
) -> list[str]:
    """Takes tasks and acknowledges each; returns their ids in the order of their coming."""
    ids = []
    for _ in range(count):
        [message] = await take(messages)
        ids.append(id_of(broker, message))
        await message.ack()  # type: ignore[misc]  # ours can be awaited
    return ids


async def acknowledge(*messages: AckableMessage) -> None:
    for message in messages:
        await message.ack()  # type: ignore[misc]  # ours can be awaited


async def until_healthy(broker: SQLAlchemyBroker) -> None:
    listener = broker.runtime.listener
    assert listener is not None

    async def is_healthy() -> bool:
        return listener.is_healthy

    await eventually(is_healthy)


@asynccontextmanager
async def working(broker: AsyncBroker, **arguments: Any) -> AsyncIterator[Receiver]:
    """Has taskiq's own receiver execute the broker's tasks."""
    finish = asyncio.Event()
    options = {"max_async_tasks": 10, "run_startup": False, **arguments}
    receiver = Receiver(broker, **options)
    running = asyncio.create_task(receiver.listen(finish))
    try:
        yield receiver
    finally:
        finish.set()
        async with asyncio.timeout(2 * SOON):
            await running
