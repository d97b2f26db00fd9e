"""Databases as the library opens them, and what the tests of their connections ask about them."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.database import Database as Connected
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.timings import DEFAULT_TIMINGS
from tests.conftest import Database, assert_nothing_checked_out, eventually

Backend = SQLAlchemyResultBackend[Any]

SESSION = sa.select(sa.func.pg_backend_pid())
FAILING = sa.select(sa.literal_column("1 / 0"))

PROGRESS: TaskProgress[Any] = TaskProgress(state="running", meta=None)


class Log:
    """The statements that asyncpg sends for the library."""

    def __init__(self) -> None:
        self.queries: list[str] = []

    def attach(self, dbapi_connection: Any, _record: Any) -> None:
        connection = dbapi_connection.driver_connection
        connection.add_query_logger(lambda record: self.queries.append(record.query))

    def count(self, part: str) -> int:
        """How many of them contain this."""
        return sum(part in query for query in self.queries)


def address(database: Database, driver: str, application_name: str = "ours") -> str:
    dsn = database.dsn_of(driver)
    return f"{dsn}&application_name={application_name}"


class Checkouts:
    """Counts how often and how many connections are checked out of a pool."""

    def __init__(self) -> None:
        self.total = self.current = self.most = 0

    @property
    def pool_events(self) -> list[tuple[Callable[..., None], str]]:
        """For create_async_engine()."""
        return [
            (self._note_checkout, "checkout"),
            (self._note_checkin, "checkin"),
            (self._note_checkin, "detach"),
        ]

    def _note_checkout(self, *_: Any) -> None:
        self.total += 1
        self.current += 1
        self.most = max(self.most, self.current)

    def _note_checkin(self, *_: Any) -> None:
        self.current -= 1


class Databases:
    """Opens databases on engines of their own and on engines of an application's."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._opened: list[Connected] = []
        self._engines: list[AsyncEngine] = []

    async def open(self, owner: str = "owned", **arguments: Any) -> Connected:
        """A database; the arguments that it does not know are for the engine."""
        known = {"max_connections", "listen_dsn", "retry_timeout", "command_timeout"}
        own = {name: arguments.pop(name) for name in known & arguments.keys()}
        timings = arguments.pop("timings", DEFAULT_TIMINGS)
        if owner == "owned":
            opened = Connected(self.dsn, engine_kwargs=arguments, **own)
        else:
            self._engines.append(make_engine(self.dsn, **arguments))
            opened = Connected(engine=self._engines[-1], **own)
        await opened.open(timings)
        self._opened.append(opened)
        return opened

    async def close(self) -> None:
        """Closes them all; of borrowed engines, no connection may be in use."""
        for opened in self._opened:
            await opened.close()
        for engine in self._engines:
            assert_nothing_checked_out(engine)
            await engine.dispose()


each_owner = pytest.mark.parametrize("owner", ["owned", "borrowed"])


async def session_of(opened: Connected) -> int:
    """The server's session that a statement runs in."""
    [(session,)] = await opened.fetch(SESSION, {}, "ask")
    return int(session)


async def session_of_transaction(opened: Connected) -> int:
    """The server's session that a transaction runs in."""

    async def ask(connection: AsyncConnection) -> int:
        return int((await connection.execute(SESSION)).scalar_one())

    return await opened.transact(ask, "ask")


async def assert_disconnected(
    database: Database, application_name: str = "ours", *, collects: bool = False
) -> None:
    """Waits until the server has no session of that name.

    With `collects`, the garbage collector runs meanwhile: it has to close a connection of psycopg
    whose opening is cancelled, and those of a backend that is not shut down.
    """

    async def is_disconnected() -> bool:
        sessions = await database.sessions(application_name)
        if sessions and collects:
            gc.collect()
        return sessions == []

    await eventually(is_disconnected)
