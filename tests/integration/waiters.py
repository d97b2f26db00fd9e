"""What the tests of waiting share: backends on common tables, and a look at who listens."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from taskiq_sa_pg import Models, SQLAlchemyResultBackend, build_models
from taskiq_sa_pg.database import Database as Connected
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.models import TaskIdField
from taskiq_sa_pg.timings import DEFAULT_TIMINGS
from taskiq_sa_pg.waiting import Listener, Waiters
from tests.conftest import Database, assert_nothing_checked_out, eventually
from tests.integration.databases import assert_disconnected
from tests.tasks import new_id

Backend = SQLAlchemyResultBackend[Any]

# For what comes at once; a waiter that is not woken fails its test after this.
SOON = 5.0


def waiters_of(backend: Backend) -> Waiters:
    return backend.runtime.waiters


def listener_of(backend: Backend) -> Listener:
    listener = waiters_of(backend).listener
    assert listener is not None
    return listener


async def until_healthy(backend: Backend) -> None:
    async def is_healthy() -> bool:
        return listener_of(backend).is_healthy

    await eventually(is_healthy)


async def until_waiting(backend: Backend, waiters: int = 1) -> None:
    """Returns when that many subscriptions wait, and have looked."""

    async def are_waiting() -> bool:
        subscriptions = waiters_of(backend).subscriptions
        return len(subscriptions) == waiters and all(s.is_awaited for s in subscriptions)

    await eventually(are_waiting)


async def until_nobody_waits(backend: Backend) -> None:
    async def nobody_waits() -> bool:
        return waiters_of(backend).waiting == 0

    await eventually(nobody_waits)


@asynccontextmanager
async def heard_by(backend: Backend) -> AsyncIterator[None]:
    """Keeps a backend listening: inside of it, notifications arrive."""
    waiter: asyncio.Task[Any] = asyncio.create_task(backend.wait_result(new_id()))
    try:
        await until_healthy(backend)
        yield
    finally:
        waiter.cancel()
        await asyncio.wait([waiter])


@contextmanager
def counted_fetches() -> Iterator[list[str]]:
    """The purposes of the statements that are run through any database, but for notifications."""
    purposes: list[str] = []
    fetch = Connected.fetch

    async def note(
        self: Connected, statement: Any, parameters: Any, purpose: str, **options: Any
    ) -> Any:
        if not purpose.startswith("send notifications"):
            purposes.append(purpose)
        return await fetch(self, statement, parameters, purpose, **options)

    Connected.fetch = note  # type: ignore[method-assign]  # to count
    try:
        yield purposes
    finally:
        Connected.fetch = fetch  # type: ignore[method-assign]  # as it was


class Backends:
    """Backends of one test, whose sessions have a name of their own."""

    def __init__(self, database: Database, driver: str = "asyncpg") -> None:
        self.database = database
        self.driver = driver
        self.name = f"waiting_{new_id()}"
        self._started: list[Backend] = []
        self._engines: list[AsyncEngine] = []

    def dsn(self, driver: str | None = None) -> str:
        is_psycopg = (driver or self.driver) == "psycopg"
        dsn = self.database.psycopg_dsn if is_psycopg else self.database.dsn
        return f"{dsn}&application_name={self.name}"

    def direct_dsn(self, driver: str | None = None) -> str:
        """The same past any pooler, which would not let notifications through."""
        dsn = self.database.direct_dsn
        if (driver or self.driver) == "psycopg":
            dsn = dsn.replace("postgresql:", "postgresql+psycopg:", 1)
        return f"{dsn}&application_name={self.name}"

    async def start(
        self, *, driver: str | None = None, is_borrowed: bool = False, **kwargs: Any
    ) -> Any:
        """Starts a backend on the table of its kind of ids, which the tests of a file share."""
        kind = kwargs.pop("field_for_task_id", "VarChar")
        models = models_of(kwargs.pop("table_name", table_of(self.database, kind)), kind)
        kwargs = {"models": models, "check_schema": "off", **kwargs}
        if self.database.is_deaf and kwargs.get("notify", True):
            kwargs.setdefault("listen_dsn", self.direct_dsn(driver))
        pool = {key: kwargs.pop(key) for key in ("pool_size",) if key in kwargs}
        timings = kwargs.pop("timings", DEFAULT_TIMINGS)
        if is_borrowed:
            engine = make_engine(self.dsn(driver), **pool)
            self._engines.append(engine)
            backend = Backend(engine=engine, **kwargs)
        else:
            backend = Backend(self.dsn(driver), **kwargs, **pool)
        backend.settings = replace(backend.settings, timings=timings)
        await backend.startup()
        self._started.append(backend)
        return backend

    async def listening(self) -> list[int]:
        """The server processes that serve the listening connections."""
        rows = await self.database.fetch(
            "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND query ~ '^LISTEN'",
            self.name,
        )
        return [row["pid"] for row in rows]

    async def close(self) -> None:
        """Shuts all backends down; nobody may wait, and no session may be left."""
        for backend in self._started:
            if backend.is_started:
                await until_nobody_waits(backend)
            await backend.shutdown()
        for engine in self._engines:
            assert_nothing_checked_out(engine)
            await engine.dispose()
        await assert_disconnected(self.database, self.name, collects=True)


def table_of(database: Database, kind: str = "VarChar") -> str:
    """A name whose channel is nobody else's: channels belong to the whole database."""
    return f"{kind}_{database.schema[-20:]}"


def channel_of(database: Database, kind: str = "VarChar") -> str:
    """Where the results of that table are told of; of progress, with `_progress` after it."""
    return f"taskiq_sa_pg.{table_of(database, kind)}"


@lru_cache
def models_of(table_name: str, kind: TaskIdField) -> Models:
    """To make them takes longer than most tests."""
    return build_models(table_name=table_name, field_for_task_id=kind)


async def insert(database: Database, task_id: str, value: Any) -> None:
    """Stores a result as somebody does who knows nothing of notifications."""
    await database.fetch(
        f'INSERT INTO "{table_of(database)}" '
        "(task_id, is_err, return_value, execution_time, labels) VALUES ($1, false, $2, 0.1, '{}')",
        *(task_id, pickle.dumps(value)),
    )


@asynccontextmanager
async def overheard(database: Database, *channels: str) -> AsyncIterator[list[tuple[str, str]]]:
    """Channel and payload of what is notified, as a connection of asyncpg's hears it."""
    heard: list[tuple[str, str]] = []
    connection = await asyncpg.connect(database.direct_dsn)
    for channel in channels:
        await connection.add_listener(channel, lambda *args: heard.append(args[2:]))
    yield heard
    await connection.close()
