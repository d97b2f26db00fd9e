"""The connections that statements run on: few, and kept between statements.

The engine's pool hands them out, opens and closes them. The way through the pool for every
statement would cost as much as a small statement.
"""

import asyncio
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

from taskiq_sa_pg.background import start_task
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
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

# A server that does not answer would keep us for as long as it likes.
MAX_SECONDS_TO_CLOSE: Final = 2.0

# In the pool's notes about a connection: when it last answered us, by the event loop's clock.
_ANSWERED_AT: Final = "taskiq_sa_pg.answered_at"


class Connections:
    """A bounded number of an engine's connections, each for one statement or transaction at a time.

    Whoever comes when all are in use waits, first come first served. There are never more than
    the engine's pool has places. With `keep` a connection stays checked out after its statement,
    for some seconds in all; others who use the same pool might have to wait for it. The first one
    that is opened is shown to `examine`, which may raise.
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
    def kept(self) -> int:
        """How many are checked out although nothing runs on them."""
        return len(self._kept)

    async def fetch(
        self, statement: Executable, parameters: Parameters, timeout: float
    ) -> Sequence[Any]:
        """The rows of a statement in AUTOCOMMIT; the timeout includes the way to a connection."""
        deadline = self.loop.time() + timeout
        execution = await self._take(deadline)
        try:
            rows = await execution.fetch(statement, parameters, deadline)
        except BaseException as exc:
            # Neither who is cancelled a second time nor a silent server keeps it from going back.
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

        All of it may take so many seconds; only the way to the connection, if not `is_limited`.

        Raises:
            NoPlaceError: Others have all connections of the pool.
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
                    # Explicitly: the engine's own default may be AUTOCOMMIT.
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
        """A connection that the pool no longer knows, and the driver's; closed at the end.

        It takes no place from statements, however long it is open. The way to it may take so many
        seconds.
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
                # SQLAlchemy would not close it for psycopg, and roll back even where it is lost.
                try:
                    await connection.invalidate()
                finally:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(MAX_SECONDS_TO_CLOSE):
                            await driver.close()

    def invalidate_all(self) -> None:
        """Replaces every connection that has not answered since, as it would be used next.

        Where one was lost the others are likely to be: behind a network that went silent each of
        them would cost the time limit of a statement. After a failover they may be alive and lead
        to the old primary.
        """
        self._invalidated_at = self.loop.time()

    async def close(self) -> None:
        """Gives all back to the pool, those in use when their statement has ended."""
        self._keep_seconds = 0.0
        if self._sweeper is not None:
            self._sweeper.cancel()
        while self._kept:
            _ = self._close(self._kept.pop())
        # Whoever came earlier has a place earlier: with all of them, nobody is left.
        for _ in range(self._limit):
            await self._places.acquire()
        if self._closing:
            await asyncio.wait(self._closing)

    def abandon(self) -> None:
        """Leaves the kept connections to the garbage collector, because their loop has ended."""
        while self._kept:
            abandoned = self._kept.pop().connection.sync_connection
            assert abandoned is not None
            # Else the pool would complain that it never came back.
            abandoned.detach()

    async def _take(self, deadline: float) -> Execution:
        if self._places.locked():
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        else:
            await self._places.acquire()  # which waits for nothing
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
        """A limit for the way to a connection.

        Raises:
            NoPlaceError: Others have all connections of the pool.
            TimeoutError: It took longer.
        """
        try:
            async with time_limit(seconds):
                yield
        except (TimeoutError, PoolTimeoutError) as exc:
            self._check_pool(exc)
            raise

    def _check_pool(self, exc: Exception) -> None:
        """Tells where there was no connection because the pool may open no more.

        Raises:
            NoPlaceError: Others have all of them.
        """
        if isinstance(exc, PoolTimeoutError) or _is_exhausted(self.engine):
            raise NoPlaceError(_checked_out(self.engine)) from exc

    async def _make_room(self) -> None:
        # So that all of ours together stay within the limit, and the pool has a place.
        if self._kept:
            await asyncio.shield(self._close(self._kept.pop()))

    def _take_kept(self) -> Execution | None:
        while self._kept:
            execution = self._kept.pop()
            if execution.answered_at >= self._invalidated_at and not execution.is_closed():
                return execution
            # Not waited for: a silent server keeps it for a while.
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
        seconds, nobody = self._keep_seconds, Context()
        self._sweeper = self.loop.call_later(seconds, self._sweep, context=nobody)

    async def _driver_of(self, connection: AsyncConnection) -> Any:
        driver = await _open_driver_of(connection, self._invalidated_at)
        if self._examine is not None:
            try:
                await self._examine(driver)
            except BaseException:
                await connection.invalidate()  # who was cancelled leaves an answer behind
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
        # Its place is free once it has gone back, whoever waits for that.
        closing = self._close(execution, invalidate)
        closing.add_done_callback(lambda _: self._places.release())
        return closing

    def _close(self, execution: Execution, invalidate: bool = False) -> asyncio.Task[None]:
        # In a task of its own: SQLAlchemy loses a place of the pool when it is cancelled in this.
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
        # A new one has just answered, and one that others opened is trusted once.
        answered_at = pooled.info.setdefault(_ANSWERED_AT, asyncio.get_running_loop().time())
        if answered_at >= invalidated_at and not is_closed_of(pooled.driver_connection)():
            return pooled.driver_connection
        await connection.invalidate()


def _note_answer(connection: AsyncConnection, at: float) -> None:
    if connection.sync_connection is not None and not connection.invalidated:
        connection.sync_connection.info[_ANSWERED_AT] = at


def _is_exhausted(engine: AsyncEngine) -> bool:
    pool = engine.pool
    most = getattr(pool, "_max_overflow", -1)  # which no public name tells; -1 is no bound
    return isinstance(pool, QueuePool) and not pool.checkedin() and 0 <= most <= pool.overflow()


def _checked_out(engine: AsyncEngine) -> str:
    pool = engine.pool
    return f"{pool.checkedout()} " if isinstance(pool, QueuePool) else ""


def _size_of_pool(engine: AsyncEngine) -> int | None:
    """How many connections a pool keeps; None or 0 where it sets no bound."""
    pool = engine.pool
    if isinstance(pool, StaticPool | AssertionPool):
        # They give the one connection that they have to everybody who asks, or refuse a second.
        return 1
    return pool.size() if isinstance(pool, QueuePool) else None


async def disposing(connections: Connections) -> AsyncGenerator[None, None]:
    """Ends the connections and their engine when it is closed."""
    # asyncio.run() and its like close the async generators of their event loop before the loop
    # itself, so connections that nobody shut down are closed while they still can be.
    try:
        yield
    finally:
        try:
            await connections.close()
        finally:
            await dispose(connections.engine)


async def dispose(engine: AsyncEngine) -> None:
    """Closes the connections of a pool, or leaves them alone if the server stands still."""
    try:
        async with asyncio.timeout(MAX_SECONDS_TO_CLOSE):
            await engine.dispose()
    except TimeoutError:  # asyncpg itself would wait for ever
        await engine.dispose(close=False)
