"""The connections that statements run on: few, kept between statements, close to the driver.

The engine's pool hands them out, opens and closes them. What costs as much as a small statement is
left out where nobody can notice: the way through the pool for every statement, and SQLAlchemy's
execution where the driver is asyncpg and nothing listens to the engine.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from math import inf
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    AssertionPool,
    Dialect,
    Executable,
    QueuePool,
    StaticPool,
)
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskiq_sa_pg.limits import SECONDS_TO_GIVE_UP, Slots, Watch, time_limit
from taskiq_sa_pg.upserts import CONVERTED

# Afterwards the pool's own care, such as pool_recycle and pool_pre_ping, has its turn.
_MAX_SECONDS_KEPT: Final = 5.0

# A server that does not answer would keep us for as long as it likes.
_MAX_SECONDS_TO_CLOSE: Final = 2.0

# In the pool's notes about a connection: when it last answered us, by the event loop's clock.
_ANSWERED_AT: Final = "taskiq_sa_pg.answered_at"

_ENGINE_EVENTS: Final = (
    "before_execute",
    "after_execute",
    "before_cursor_execute",
    "after_cursor_execute",
    "begin",
)
_DIALECT_EVENTS: Final = ("do_execute", "do_execute_no_params", "handle_error")

# They give the one connection that they have to everybody who asks, or refuse a second.
_POOLS_OF_ONE: Final = (StaticPool, AssertionPool)


class Connections:
    """A bounded number of an engine's connections, each for one statement or transaction at a time.

    Whoever comes when all are in use waits, first come first served.

    Args:
        engine: Where they come from.
        limit: How many at once; no more than the places of the engine's pool.
        keep: Whether a connection stays checked out after its statement, for 5 s in all. Others
            who use the same pool might have to wait for it.
    """

    def __init__(self, engine: AsyncEngine, limit: int, *, keep: bool) -> None:
        self._engine = engine
        self._keep = keep
        self._loop = asyncio.get_running_loop()
        self._limit = min(limit, _size_of_pool(engine) or limit)
        self._slots = Slots(self._limit)
        self._kept: list[_Connection] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._texts: dict[Executable, _Text] = {}
        self._distrusted_at = -inf

    @property
    def kept(self) -> int:
        """How many are checked out although nothing runs on them."""
        return len(self._kept)

    async def fetch(
        self, statement: Executable, parameters: Mapping[str, Any], deadline: float
    ) -> Sequence[Any]:
        """The rows of a statement in AUTOCOMMIT.

        Args:
            statement: What to run.
            parameters: Its parameters, all of them.
            deadline: When it has to be done, by the event loop's clock.

        Raises:
            TimeoutError: It was not.
        """
        connection = self._take_one_at_hand() or await self._wait_for_one(deadline)
        try:
            connection.watch.deadline = deadline
            with connection.watch:
                rows = await connection.fetch(statement, parameters)
            connection.answered_at = now = self._loop.time()
        except BaseException as exc:
            # Neither who is cancelled a second time nor a silent server keeps it from going back.
            closing = self._close(connection, connection.is_unusable_after(exc))
            await asyncio.wait([closing], timeout=SECONDS_TO_GIVE_UP)
            raise
        else:
            if self._keep and now < connection.expires_at:
                self._kept.append(connection)
                if self._sweeper is None:
                    self._schedule_sweep()
            else:
                await asyncio.shield(self._close(connection))
            return rows
        finally:
            self._slots.give_back()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A connection in one transaction: committed at the end, rolled back by an exception."""
        async with self._slots:
            await self._make_room()
            async with self._engine.connect() as connection:
                await _open_driver_of(connection, self._distrusted_at)
                # Explicitly: the engine's own default may be AUTOCOMMIT.
                await _set_isolation_level(connection, "READ COMMITTED")
                async with connection.begin():
                    yield connection
                _note_answer(connection)

    @asynccontextmanager
    async def detached(self, level: IsolationLevel) -> AsyncIterator[tuple[AsyncConnection, Any]]:
        """A connection that the pool no longer knows, and the driver's; closed at the end.

        It takes no place from statements, however long it is open.
        """
        async with AsyncExitStack() as stack:
            async with self._slots:
                await self._make_room()
                connection = await stack.enter_async_context(self._engine.connect())
                driver = await _open_driver_of(connection, self._distrusted_at)
                await _set_isolation_level(connection, level)
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
                        async with asyncio.timeout(_MAX_SECONDS_TO_CLOSE):
                            await driver.close()

    def distrust(self) -> None:
        """Replaces every connection that has not answered since, as it would be used next.

        Where one was lost the others are likely to be: behind a network that went silent each of
        them would cost the time limit of a statement. After a failover they may be alive and lead
        to the old primary.
        """
        self._distrusted_at = asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Gives all back to the pool, those in use when their statement has ended."""
        self._keep = False
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        while self._kept:
            await self._kept.pop().close()
        # Whoever came earlier has a slot earlier: with all of them, nobody is left.
        for _ in range(self._limit):
            await self._slots.wait()
        if self._closing:
            await asyncio.wait(self._closing)

    def abandon(self) -> None:
        """Leaves the kept connections to the garbage collector, because their loop has ended."""
        while self._kept:
            self._kept.pop().abandon()

    async def _make_room(self) -> None:
        # So that all of ours together stay within the limit, and the pool has a place.
        if self._kept:
            await asyncio.shield(self._close(self._kept.pop()))

    def _take_one_at_hand(self) -> "_Connection | None":
        """A kept connection with its place, where there is nothing to wait for."""
        if self._kept and self._is_trusted(self._kept[-1]) and self._slots.take():
            return self._kept.pop()
        return None

    async def _wait_for_one(self, deadline: float) -> "_Connection":
        """A connection with its place."""
        async with time_limit(deadline - self._loop.time()):
            await self._slots.wait()
            try:
                while self._kept:
                    connection = self._kept.pop()
                    if self._is_trusted(connection):
                        return connection
                    # Not waited for: a silent server keeps it for a while.
                    _ = self._close(connection, invalidate=True)
                return await _check_out(self._engine, self._texts, self._distrusted_at)
            except BaseException:
                self._slots.give_back()
                raise

    def _is_trusted(self, connection: "_Connection") -> bool:
        return connection.answered_at >= self._distrusted_at and not connection.is_closed()

    def _schedule_sweep(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(_MAX_SECONDS_KEPT, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for connection in [connection for connection in self._kept if connection.expires_at <= now]:
            self._kept.remove(connection)
            _ = self._close(connection)
        if self._kept:
            self._schedule_sweep()

    def _close(self, connection: "_Connection", invalidate: bool = False) -> asyncio.Task[None]:
        # In a task of its own: SQLAlchemy loses a place of the pool when it is cancelled in this.
        closing = asyncio.create_task(connection.close(invalidate))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing


class _Connection:
    """A connection in AUTOCOMMIT."""

    def __init__(
        self, connection: AsyncConnection, driver: Any, texts: "dict[Executable, _Text] | None"
    ) -> None:
        self._connection = connection
        self._driver = driver
        self._texts = texts
        # Whether the server or the driver has closed it.
        self.is_closed: Final = _is_closed_of(driver)
        self.watch: Final = Watch()
        self.answered_at = asyncio.get_running_loop().time()
        self.expires_at: Final = self.answered_at + _MAX_SECONDS_KEPT

    @property
    def is_direct(self) -> bool:
        """Whether statements go to the driver past SQLAlchemy."""
        return self._texts is not None

    def is_unusable_after(self, exc: BaseException) -> bool:
        """Whether nobody must use it again. What SQLAlchemy executes, it judges itself."""
        # Only after an error of the server's own is it sure that nothing is left to be read, or
        # where nothing was sent.
        is_known = hasattr(exc, "sqlstate") or isinstance(exc, StatementError)
        return self.is_direct and (self.is_closed() or not is_known)

    def fetch(
        self, statement: Executable, parameters: Mapping[str, Any]
    ) -> Awaitable[Sequence[Any]]:
        """The rows of a statement whose parameters are all given; to be awaited at once.

        Raises:
            StatementError: A value of a user's own column cannot be converted.
        """
        if self._texts is None:
            return self._execute(statement, parameters)
        compiled = self._texts.get(statement)
        if compiled is None:
            compiled = self._texts[statement] = _compile(statement, self._connection.dialect)
        try:
            values = list(map(parameters.__getitem__, compiled.names))
        except KeyError:
            # The default of a column of the user's own, which SQLAlchemy works out.
            return self._execute_from_now_on(statement, parameters)
        for position, convert in compiled.conversions:
            try:
                values[position] = convert(values[position])
            except Exception as exc:
                # As where SQLAlchemy executes.
                raise StatementError(str(exc), compiled.text, None, exc) from exc
        rows: Awaitable[Sequence[Any]] = self._driver.fetch(compiled.text, *values)
        return rows

    async def _execute(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
        result = await self._connection.execute(statement, parameters)
        return result.all() if result.returns_rows else ()

    async def _execute_from_now_on(
        self, statement: Executable, parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        await _set_isolation_level(self._connection, "AUTOCOMMIT")
        self._texts = None
        return await self._execute(statement, parameters)

    async def close(self, invalidate: bool = False) -> None:
        """Gives it back to the pool, which may have to forget the driver's connection."""
        self.watch.stop()
        if invalidate:
            await self._connection.invalidate()
        else:
            _note_answer(self._connection, self.answered_at)
        await self._connection.close()

    def abandon(self) -> None:
        """Makes the pool forget it, which would otherwise complain that it never came back."""
        assert self._connection.sync_connection is not None
        self._connection.sync_connection.detach()


class _Text(NamedTuple):
    """A compiled statement, and the names of its parameters in their order.

    Conversions, by position, are what SQLAlchemy does to values before a driver gets them.
    """

    text: str
    names: Sequence[str]
    conversions: Sequence[tuple[int, Callable[[Any], Any]]]


def _compile(statement: Executable, dialect: Dialect) -> _Text:
    compiled: Any = statement.compile(dialect=dialect)  # type: ignore[attr-defined]  # the base lacks it
    converted = statement.get_execution_options().get(CONVERTED, ())
    conversions = []
    for position, name in enumerate(compiled.positiontup):
        if name in converted:
            convert = compiled.binds[name].type.dialect_impl(dialect).bind_processor(dialect)
            if convert is not None:
                conversions.append((position, convert))
    return _Text(compiled.string, compiled.positiontup, conversions)


async def _check_out(
    engine: AsyncEngine, texts: dict[Executable, _Text], distrusted_at: float
) -> _Connection:
    connection = await engine.connect()
    try:
        driver = await _open_driver_of(connection, distrusted_at)
        if _is_unobserved_asyncpg(engine) and not driver.is_in_transaction():
            return _Connection(connection, driver, texts)
        await _set_isolation_level(connection, "AUTOCOMMIT")
    except BaseException:
        await connection.close()
        raise
    return _Connection(connection, driver, None)


async def _set_isolation_level(connection: AsyncConnection, level: IsolationLevel) -> None:
    # SQLAlchemy sets it back as the connection returns to the pool, so a borrowed engine's other
    # users never meet it. It would not after a cancellation in the middle, and where the engine
    # sets the level as it connects (engine.execution_options), it would lose the connection.
    try:
        _ = await connection.execution_options(isolation_level=level)
    except BaseException:
        await connection.invalidate()
        raise


async def _open_driver_of(connection: AsyncConnection, distrusted_at: float) -> Any:
    while True:
        pooled = await connection.get_raw_connection()
        # A new one has just answered, and one that others opened is trusted once.
        answered_at = pooled.info.setdefault(_ANSWERED_AT, asyncio.get_running_loop().time())
        if answered_at >= distrusted_at and not _is_closed_of(pooled.driver_connection)():
            return pooled.driver_connection
        await connection.invalidate()


def _note_answer(connection: AsyncConnection, at: float | None = None) -> None:
    if connection.sync_connection is not None and not connection.invalidated:
        at = asyncio.get_running_loop().time() if at is None else at
        connection.sync_connection.info[_ANSWERED_AT] = at


def _is_closed_of(driver: Any) -> Callable[[], bool]:
    is_closed: Callable[[], bool]
    is_closed = driver.is_closed if hasattr(driver, "is_closed") else lambda: bool(driver.closed)
    return is_closed


def _is_unobserved_asyncpg(engine: AsyncEngine) -> bool:
    sync_engine = engine.sync_engine
    return (
        engine.dialect.driver == "asyncpg"
        and not sync_engine.logger.isEnabledFor(logging.INFO)  # echo=True, too
        and "schema_translate_map" not in sync_engine.get_execution_options()
        and not any(getattr(sync_engine.dispatch, name) for name in _ENGINE_EVENTS)
        and not any(getattr(engine.dialect.dispatch, name) for name in _DIALECT_EVENTS)
    )


def _size_of_pool(engine: AsyncEngine) -> int | None:
    """How many connections a pool keeps; None or 0 where it sets no bound."""
    pool = engine.pool
    if isinstance(pool, _POOLS_OF_ONE):
        return 1
    return pool.size() if isinstance(pool, QueuePool) else None
