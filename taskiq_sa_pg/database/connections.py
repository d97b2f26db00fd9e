"""The connections that statements run on: a few, which stay checked out between statements.

The engine's pool opens and closes them. To check one out for every statement would cost as much as
a small statement.
"""

import asyncio
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import Context
from math import inf
from typing import Any, Final

from sqlalchemy import AssertionPool, Executable, QueuePool, StaticPool
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskiq_sa_pg.background import leave_to_parent, start_task
from taskiq_sa_pg.database.direct import (
    SECONDS_TO_GIVE_UP,
    DirectExecution,
    Execution,
    Parameters,
    Texts,
    has_direct_path,
    is_closed_of,
    set_isolation_level,
    time_limit,
)
from taskiq_sa_pg.database.errors import NoPlaceError
from taskiq_sa_pg.exceptions import NotStartedError
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

# Bounds the wait for a server that does not answer.
MAX_SECONDS_TO_CLOSE: Final = 2.0

# A key of the pool's info about a connection: when it last answered, by the event loop's clock.
_ANSWERED_AT: Final = "taskiq_sa_pg.answered_at"


class Connections:
    """A bounded number of an engine's connections, each for one statement or transaction at a time.

    When all are in use, callers wait in FIFO order.

    Args:
        engine: The engine.
        limit: The most connections; never more than the size of the engine's pool.
        keep: Whether a connection stays checked out after its statement, until
            `timings.keep_connection` seconds after it was checked out.
        examine: Called with the first driver connection; may raise.
        timings: The durations.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        limit: int,
        *,
        keep: bool,
        examine: Callable[[Any], Awaitable[None]] | None = None,
        timings: Timings = DEFAULT_TIMINGS,
    ) -> None:
        self.engine: Final = engine
        self.loop: Final = asyncio.get_running_loop()
        self._process = os.getpid()
        self._keep_seconds = timings.keep_connection if keep else 0.0
        self._examine = examine
        self._limit = min(limit, _size_of_pool(engine) or limit)
        self._places = asyncio.Semaphore(self._limit)
        self._kept: list[Execution] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._texts: Texts = {}
        self._invalidated_at = -inf

    @property
    def is_running(self) -> bool:
        """Whether its event loop runs. That of the parent of a fork does not run in the child."""
        return self.loop.is_running() and self._process == os.getpid()

    @property
    def kept(self) -> int:
        """The number of connections that are checked out and idle."""
        return len(self._kept)

    async def fetch(
        self, statement: Executable, parameters: Parameters, timeout: float
    ) -> Sequence[Any]:
        """Runs a statement in AUTOCOMMIT and returns its rows; the timeout includes connecting."""
        deadline = self.loop.time() + timeout
        execution = await self._take(deadline)
        try:
            rows = await execution.fetch(statement, parameters, deadline)
        except BaseException as exc:
            # In the background: neither a second cancellation nor a silent server may prevent it.
            closing = self._close_and_leave(execution, execution.is_unusable_after(exc))
            await asyncio.wait([closing], timeout=SECONDS_TO_GIVE_UP)
            raise
        execution.answered_at = now = self.loop.time()
        if now < execution.opened_at + self._keep_seconds:
            self._kept.append(execution)
            self._places.release()
            if self._sweeper is None:
                self._sweep_later()
        else:
            await asyncio.shield(self._close_and_leave(execution))
        return rows

    @asynccontextmanager
    async def transaction(
        self, seconds: float, *, is_limited: bool = True
    ) -> AsyncIterator[AsyncConnection]:
        """A connection in one transaction: committed at the end, rolled back by an exception.

        The time limit is for all of it; with `is_limited=False`, for connecting only.

        Raises:
            NoPlaceError: Other code uses all connections of the pool.
            TimeoutError: It took longer.
        """
        has_connection = has_place = False
        try:
            async with time_limit(seconds) as lift_limit, self._places:
                has_place = True
                await self._make_room()
                async with self.engine.connect() as connection:
                    has_connection = True
                    await self._driver_of(connection)
                    # The engine's default may be AUTOCOMMIT.
                    await set_isolation_level(connection, "READ COMMITTED")
                    if not is_limited:
                        lift_limit()
                    async with connection.begin():
                        yield connection
                    _note_answer(connection, self.loop.time())
        except (TimeoutError, PoolTimeoutError) as exc:
            if has_place and not has_connection:
                self._check_pool(exc)
            raise

    @asynccontextmanager
    async def detached(
        self, level: IsolationLevel, seconds: float
    ) -> AsyncIterator[tuple[AsyncConnection, Any]]:
        """A connection removed from the pool, and the driver's connection; closed at the end.

        It does not count towards the limit, however long it is open. The time limit is for
        connecting.
        """
        async with AsyncExitStack() as stack:
            async with self._limited(seconds), self._places:
                await self._make_room()
                connection = await stack.enter_async_context(self.engine.connect())
                driver = await self._driver_of(connection)
                await set_isolation_level(connection, level)
                assert connection.sync_connection is not None
                connection.sync_connection.detach()
            try:
                yield connection, driver
            finally:
                # SQLAlchemy would not close psycopg's, and would roll back even if it is lost.
                try:
                    await connection.invalidate()
                finally:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(MAX_SECONDS_TO_CLOSE):
                            await driver.close()

    def invalidate_all(self) -> None:
        """Replaces each open connection when it is used next.

        If one was lost, the others probably are as well: in a silent network, each of them would
        take the whole time limit. After a failover they may be alive, but on the old primary.
        """
        self._invalidated_at = self.loop.time()

    async def close(self) -> None:
        """Returns all connections to the pool, and waits for statements that still run."""
        self._keep_seconds = 0.0
        if self._sweeper is not None:
            self._sweeper.cancel()
        while self._kept:
            _ = self._close(self._kept.pop())
        # FIFO: with all places acquired, no statement is left.
        for _ in range(self._limit):
            await self._places.acquire()
        if self._closing:
            await asyncio.wait(self._closing)

    async def abandon(self) -> None:
        """Leaves idle connections to the garbage collector: their event loop has ended.

        In the child of a fork all connections are left to the parent; its engine gets a new pool.
        """
        if self._process != os.getpid():
            leave_to_parent(self.loop, self, self.engine.pool)
            await self.engine.dispose(close=False)
            return
        while self._kept:
            abandoned = self._kept.pop().connection.sync_connection
            assert abandoned is not None
            # Otherwise the pool would warn that it was not returned.
            abandoned.detach()

    async def _take(self, deadline: float) -> Execution:
        if self._places.locked():
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        else:
            await self._places.acquire()  # does not wait
        try:
            execution = self._take_kept()
            if execution is None:
                async with self._limited(deadline - self.loop.time()):
                    execution = await self._check_out()
        except BaseException:
            self._places.release()
            raise
        return execution

    @asynccontextmanager
    async def _limited(self, seconds: float) -> AsyncIterator[None]:
        """A time limit for connecting.

        Raises:
            NoPlaceError: Other code uses all connections of the pool.
            TimeoutError: It took longer.
        """
        try:
            async with time_limit(seconds):
                yield
        except (TimeoutError, PoolTimeoutError) as exc:
            self._check_pool(exc)
            raise

    def _check_pool(self, exc: Exception) -> None:
        """Checks whether the cause of a timeout is that the pool may open no more connections.

        Raises:
            NoPlaceError: Other code uses all of them.
        """
        if isinstance(exc, PoolTimeoutError) or _is_exhausted(self.engine):
            raise NoPlaceError(_checked_out(self.engine)) from exc

    async def _make_room(self) -> None:
        # So that the total stays within the limit, and the pool can hand out a connection.
        if self._kept:
            await asyncio.shield(self._close(self._kept.pop()))

    def _take_kept(self) -> Execution | None:
        while self._kept:
            execution = self._kept.pop()
            if execution.answered_at >= self._invalidated_at and not execution.is_closed():
                return execution
            # Not awaited: with a silent server this takes a while.
            _ = self._close(execution, invalidate=True)
        return None

    async def _check_out(self) -> Execution:
        connection = await self.engine.connect()
        try:
            driver = await self._driver_of(connection)
        except BaseException:
            await connection.close()
            raise
        if has_direct_path(self.engine) and not driver.is_in_transaction():
            return DirectExecution(connection, driver, self._texts)
        return Execution(connection, driver)

    def _sweep_later(self) -> None:
        seconds, empty = self._keep_seconds, Context()
        self._sweeper = self.loop.call_later(seconds, self._sweep, context=empty)

    async def _driver_of(self, connection: AsyncConnection) -> Any:
        driver = await _open_driver_of(connection, self._invalidated_at)
        if self._examine is not None:
            try:
                await self._examine(driver)
            except BaseException:
                await connection.invalidate()  # after a cancellation, an answer may be unread
                raise
            self._examine = None
        return driver

    def _sweep(self) -> None:
        self._sweeper = None
        oldest = self.loop.time() - self._keep_seconds
        for execution in [each for each in self._kept if each.opened_at <= oldest]:
            self._kept.remove(execution)
            _ = self._close(execution)
        if self._kept:
            self._sweep_later()

    def _close_and_leave(
        self, execution: Execution, invalidate: bool = False
    ) -> asyncio.Task[None]:
        # Its place is released when it is back in the pool, whether or not that is awaited.
        closing = self._close(execution, invalidate)
        closing.add_done_callback(lambda _: self._places.release())
        return closing

    def _close(self, execution: Execution, invalidate: bool = False) -> asyncio.Task[None]:
        # In a separate task: if this were cancelled, SQLAlchemy would lose a place of the pool.
        closing = start_task(_give_back(execution, invalidate))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing


async def _give_back(execution: Execution, invalidate: bool) -> None:
    if invalidate:
        await execution.connection.invalidate()
    else:
        _note_answer(execution.connection, execution.answered_at)
    await execution.connection.close()


async def _open_driver_of(connection: AsyncConnection, invalidated_at: float) -> Any:
    while True:
        pooled = await connection.get_raw_connection()
        # A new one has just answered; one that other code opened is trusted once.
        answered_at = pooled.info.setdefault(_ANSWERED_AT, asyncio.get_running_loop().time())
        if answered_at >= invalidated_at and not is_closed_of(pooled.driver_connection)():
            return pooled.driver_connection
        await connection.invalidate()


def _note_answer(connection: AsyncConnection, at: float) -> None:
    if connection.sync_connection is not None and not connection.invalidated:
        connection.sync_connection.info[_ANSWERED_AT] = at


def _is_exhausted(engine: AsyncEngine) -> bool:
    pool = engine.pool
    most = getattr(pool, "_max_overflow", -1)  # it has no public name; -1 is no bound
    return isinstance(pool, QueuePool) and not pool.checkedin() and 0 <= most <= pool.overflow()


def _checked_out(engine: AsyncEngine) -> str:
    pool = engine.pool
    return f"{pool.checkedout()} " if isinstance(pool, QueuePool) else ""


def _size_of_pool(engine: AsyncEngine) -> int | None:
    """The number of connections that a pool keeps; None or 0 if it sets no bound."""
    pool = engine.pool
    if isinstance(pool, StaticPool | AssertionPool):
        # They have one connection, which several users share or which only one may use.
        return 1
    return pool.size() if isinstance(pool, QueuePool) else None


async def disposing(connections: Connections) -> AsyncGenerator[None, None]:
    """Closes the connections and disposes their engine when the generator is closed."""
    # asyncio.run() closes async generators before it closes the event loop. So connections are
    # closed in time even if shutdown() was not called.
    try:
        yield
    finally:
        try:
            await connections.close()
        finally:
            await dispose(connections.engine)


async def dispose(engine: AsyncEngine) -> None:
    """Closes the connections of a pool, or abandons them if the server does not answer."""
    try:
        async with asyncio.timeout(MAX_SECONDS_TO_CLOSE):
            await engine.dispose()
    except TimeoutError:  # asyncpg would wait for ever
        await engine.dispose(close=False)


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Checks that the running event loop is the one of startup().

    Raises:
        NotStartedError: It is another one.
    """
    try:
        is_another = asyncio.get_running_loop() is not loop
    except RuntimeError:  # no loop runs, so no connection can be used
        is_another = False
    if is_another:
        raise NotStartedError(
            f"startup() was called on another event loop ({loop!r}): create a broker or result "
            "backend for each event loop, or call `await startup()` on this one after the other "
            "has ended"
        )
