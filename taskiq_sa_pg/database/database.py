"""The session layer: runs statements on an AsyncEngine that it owns or borrows."""

import asyncio
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, TypeVar
from weakref import WeakSet

from sqlalchemy import Engine, Executable, NullPool, Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskiq_sa_pg.database.connections import Connections, dispose, disposing
from taskiq_sa_pg.database.direct import Parameters, time_limit
from taskiq_sa_pg.database.dsn import DsnSource, parse_dsn
from taskiq_sa_pg.database.engine import (
    check_engine,
    keep_notifications,
    make_engine,
    may_be_of,
    refuse_pooler,
)
from taskiq_sa_pg.database.errors import (
    READ_ONLY,
    NoAddressError,
    describe,
    errors_of,
    invalidates_all,
    is_disconnect,
    is_refused_login,
    is_transient,
)
from taskiq_sa_pg.database.retry import Retry
from taskiq_sa_pg.database.stream import Stream
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    NotStartedError,
    StorageError,
    check_number,
    check_whole,
)
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

logger = logging.getLogger(__name__)

DEFAULT_MAX_CONNECTIONS: Final = 4

# Seconds.
DEFAULT_RETRY_TIMEOUT: Final = 60.0
DEFAULT_COMMAND_TIMEOUT: Final = 30.0

_NOT_STARTED: Final = (
    "not started: call `await broker.startup()` first, or the startup() of a result backend that "
    "is used alone"
)

_AT_REPLICA: Final = "the server is a read replica (a hot standby), which has no notifications"

_T = TypeVar("_T")


class Database:
    """Runs statements on an engine, again where they failed for a reason that passes.

    An engine that is given is borrowed: its pool is used and it is never disposed. One that is
    made from a DSN is owned: open() makes it, close() disposes it. The arguments are those of the
    backend.

    What runs statements raises NotStartedError where the database is not open, and StorageError
    where PostgreSQL refused one or could not be reached in time. A `purpose` is what could not be
    done then: "store the result of ...". A `retry_timeout` is used instead of the usual one.

    Raises:
        ConfigurationError: Neither a DSN nor an engine, both, a DSN that cannot work, or an
            engine that is not an AsyncEngine on PostgreSQL.
    """

    def __init__(
        self,
        dsn: DsnSource | None = None,
        *,
        engine: AsyncEngine | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        listen_dsn: DsnSource | None = None,
        retry_timeout: float = DEFAULT_RETRY_TIMEOUT,
        command_timeout: float = DEFAULT_COMMAND_TIMEOUT,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        if (dsn is None) == (engine is None):
            raise ConfigurationError(
                "give either dsn= (it gets an engine of its own) or engine= (which is used, "
                "and never disposed)"
            )
        if engine is not None:
            check_engine(engine, engine_kwargs)
        # A callable is asked when it is needed.
        if dsn is not None and not callable(dsn):
            make_engine(dsn, **engine_kwargs or {})
        if listen_dsn is not None and not callable(listen_dsn):
            make_engine(listen_dsn, "listen_dsn", poolclass=NullPool)
        check_whole("max_connections", max_connections)
        check_number("retry_timeout", retry_timeout, 0)
        check_number("command_timeout", command_timeout, 0, is_above=True)
        self._dsn = dsn
        self._borrowed = engine
        self._engine_kwargs = dict(engine_kwargs or {})
        self._max_connections = max_connections
        self._listen_dsn = listen_dsn
        self._by_listen_dsn: Connections | None = None  # while somebody listens there
        self._place = _place_of(dsn, engine)
        self._retry = Retry(
            retry_timeout,
            command_timeout,
            is_passing=self._is_passing,
            on_retry=on_retry,
            on_error=self._note_error,
            place=self._place,
        )
        self._command_timeout = command_timeout
        self._connections: Connections | None = None  # while it is open
        self._errors: tuple[type[Exception], ...] = ()
        self._disposal: AsyncGenerator[None, None] | None = None
        self._streams: set[Stream] = set()
        self._alike: WeakSet[Engine] = WeakSet()  # those that may_be_of() has found to be

    @property
    def is_open(self) -> bool:
        """Whether it is open, on this event loop."""
        connections = self._connections
        return connections is not None and connections.loop is asyncio.get_running_loop()

    @property
    def is_owned(self) -> bool:
        """Whether it makes and disposes its engine."""
        return self._borrowed is None

    @property
    def engine(self) -> AsyncEngine:
        """What it runs on.

        Raises:
            NotStartedError: It is not open.
        """
        if self._connections is None:
            raise NotStartedError(_NOT_STARTED)
        return self._connections.engine

    @property
    def command_timeout(self) -> float:
        """How many seconds one attempt may take."""
        return self._command_timeout

    @property
    def kept(self) -> int:
        """How many connections are checked out although nothing runs on them."""
        return 0 if self._connections is None else self._connections.kept

    @property
    def streams(self) -> int:
        """How many server-side cursors are open."""
        return len(self._streams)

    def leads_where(self, other: "Database") -> bool:
        """Whether the other one's connections would do as well as its own."""
        if self._listen_dsn not in (None, other._listen_dsn):
            return False
        if self._borrowed is not None:
            return self._borrowed is other._borrowed
        return self._dsn == other._dsn and self._engine_kwargs in ({}, other._engine_kwargs)

    def may_be_of(self, engine: Engine) -> bool:
        """Whether an engine of the application's leads here, as far as its URL tells."""
        own = self._borrowed or self._dsn
        if engine not in self._alike and (callable(own) or may_be_of(own, engine)):
            self._alike.add(engine)
        return engine in self._alike

    def schema_of(self, schema: str | None) -> str | None:
        """Where a schema's tables really are: a `schema_translate_map` may lead elsewhere.

        SQLAlchemy leads there the statements that are run here, but not the catalogue's rows.
        """
        schemas = self.engine.sync_engine.get_execution_options().get("schema_translate_map") or {}
        found: str | None = schemas.get(schema, schema)
        return found

    async def open(
        self, timings: Timings = DEFAULT_TIMINGS, *, retry_timeout: float | None = None
    ) -> bool:
        """Gets the engine ready; nothing connects yet. False if it was, on this event loop.

        Raises:
            NotStartedError: It is open on another event loop, which still runs.
            StorageError: A callable that is to return the DSN has failed.
        """
        if self.is_open:
            return False
        if self._connections is not None:
            if self._connections.loop.is_running():
                raise NotStartedError(
                    "the connections are in use on another event loop, which still runs "
                    f"({self._connections.loop!r}): make a broker or result backend for each event "
                    "loop, or call `await shutdown()` there first"
                )
            self._connections.abandon()
        engine = self._borrowed
        if engine is None:
            engine = await self._make_engine(retry_timeout)
        # Others wait for a borrowed engine's connections: each goes back after its statement.
        connections = Connections(
            engine,
            self._max_connections,
            keep=self.is_owned,
            examine=None if self.is_owned else refuse_pooler,
            timings=timings,
        )
        if self.is_owned:
            self._disposal = disposing(connections)
            await anext(self._disposal)
        self._connections, self._errors = connections, errors_of(engine)
        return True

    async def _make_engine(self, retry_timeout: float | None) -> AsyncEngine:
        async def attempt(_: float) -> AsyncEngine:
            assert self._dsn is not None
            return make_engine(self._dsn, **self._engine_kwargs)

        try:
            # Not by that of the statements, which notes whether the server was ever reached.
            return await Retry(DEFAULT_RETRY_TIMEOUT).run(attempt, retry_timeout)
        except NoAddressError as exc:
            raise StorageError(*describe(exc, "make an engine")) from exc

    async def close(self) -> None:
        """Disposes the engine if it is owned; repeated calls do nothing."""
        connections, self._connections = self._connections, None
        disposal, self._disposal = self._disposal, None
        streams, self._streams = self._streams, set()
        if connections is None:
            return
        if connections.loop is not asyncio.get_running_loop():
            # Connections of another loop cannot be closed here; the garbage collector has them.
            connections.abandon()
            if disposal is not None:
                await connections.engine.dispose(close=False)
            return
        for stream in streams:
            await stream.close()
        if disposal is not None:
            await disposal.aclose()
        else:
            await connections.close()

    async def fetch(
        self,
        statement: Executable,
        parameters: Parameters,
        purpose: str,
        *,
        retry_timeout: float | None = None,
    ) -> Sequence[Any]:
        """Runs one statement in AUTOCOMMIT, which is one round trip, and returns its rows.

        It is compiled once, so it must be an object that lasts.
        """

        async def attempt(seconds: float) -> Sequence[Any]:
            return await self._running(purpose).fetch(statement, parameters, seconds)

        try:
            return await self._retry.run(attempt, retry_timeout)
        except self._errors as exc:
            raise self._told(exc, purpose) from exc

    async def fetch_all(
        self, calls: Sequence[tuple[Executable, Parameters]], purpose: str
    ) -> Sequence[Any]:
        """Runs statements with their parameters, all or none, and returns the rows of all."""
        if len(calls) == 1:
            [(statement, parameters)] = calls
            return await self.fetch(statement, parameters, purpose)

        async def execute(connection: AsyncConnection) -> list[Any]:
            rows: list[Any] = []
            for call in calls:
                result = await connection.execute(*call)
                rows += result.all() if result.returns_rows else ()
            return rows

        return await self.transact(execute, purpose)

    async def transact(
        self,
        work: Callable[[AsyncConnection], Awaitable[_T]],
        purpose: str,
        *,
        is_answer_final: bool = False,
        is_limited: bool = True,
        retry_timeout: float | None = None,
    ) -> _T:
        """Does some work in one transaction: committed at the end, rolled back by an exception.

        If the connection is lost in the COMMIT, nobody knows whether it was carried out: then what
        the work has returned counts if `is_answer_final`, else the work is done again. An attempt
        has to end in time if `is_limited`; the way to a connection always has.
        """

        async def attempt(seconds: float) -> _T:
            transaction = self._running(purpose).transaction(seconds, is_limited=is_limited)
            answers: list[_T] = []
            try:
                async with transaction as connection:
                    answers.append(await work(connection))
            except self._errors as exc:
                if not (answers and is_answer_final and is_disconnect(exc)):
                    raise
                self._note_error(exc)
                logger.warning("the connection was lost in a COMMIT that was to %s", purpose)
            return answers[0]

        try:
            return await self._retry.run(attempt, retry_timeout)
        except self._errors as exc:
            raise self._told(exc, purpose) from exc

    async def stream(
        self, statement: Select[Any], size: int, purpose: str
    ) -> AsyncGenerator[Sequence[Any], None]:
        """Yields the rows of a statement in batches, which a server-side cursor holds back.

        It has a connection of its own, beside those that statements share: whoever takes the rows
        may be slow. Close the generator, so that the connection is closed. The statement is run
        again only where a fault that passes leaves it without a first batch.
        """

        async def attempt(seconds: float) -> tuple[Stream, Sequence[Any]]:
            stream = Stream(self._running(purpose), size, self._command_timeout)
            return stream, await stream.open(statement, seconds)

        try:
            stream, rows = await self._retry.run(attempt)
            self._streams.add(stream)
            try:
                while rows:
                    yield rows
                    rows = await stream.next()
            finally:
                self._streams.discard(stream)
                await stream.close()
        except self._errors as exc:
            raise self._told(exc, purpose) from exc

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Any]:
        """A connection of the driver's own, outside of every pool, to listen_dsn if there is one.

        Raises:
            StorageError: PostgreSQL could not be reached; READ_ONLY where it is a read replica.
        """
        purpose = "listen for notifications"
        connections, engine = self._running(purpose), None
        if self._listen_dsn is not None:
            engine = make_engine(self._listen_dsn, "listen_dsn", pool_size=1)
            connections = self._by_listen_dsn = Connections(engine, 1, keep=False)
        try:
            async with AsyncExitStack() as stack:
                detached = connections.detached("AUTOCOMMIT", self._command_timeout)
                connection, driver = await stack.enter_async_context(detached)
                async with time_limit(self._command_timeout):
                    # LISTEN would leave an error in the server's log each time.
                    if await connection.scalar(select(func.pg_is_in_recovery())):
                        raise StorageError(f"cannot {purpose}: {_AT_REPLICA}", READ_ONLY)
                keep_notifications(driver)
                yield driver
        except errors_of(connections.engine) as exc:
            place = self._place if engine is None else _place_of(self._listen_dsn, None)
            raise StorageError(*describe(exc, purpose, place)) from exc
        finally:
            if engine is not None:
                self._by_listen_dsn = None
                await dispose(engine)

    async def fetch_by_listen_dsn(
        self, statement: Executable, parameters: Parameters, purpose: str
    ) -> Sequence[Any]:
        """Runs a statement once where listen_dsn leads, beside the connection that listens there.

        Raises:
            StorageError: There is no listen_dsn, so that the server is a read replica.
        """
        connections = self._by_listen_dsn
        if connections is None:
            raise StorageError(f"cannot {purpose}: {_AT_REPLICA}", READ_ONLY)
        try:
            return await connections.fetch(statement, parameters, self._command_timeout)
        except errors_of(connections.engine) as exc:
            raise StorageError(*describe(exc, purpose, _place_of(self._listen_dsn, None))) from exc

    def _told(self, exc: Exception, purpose: str) -> StorageError:
        self._note_error(exc)
        return StorageError(*describe(exc, purpose, self._place))

    def _is_passing(self, exc: Exception) -> bool:
        # A password that is refused may have been replaced since the callable was asked.
        return is_transient(exc) or (callable(self._dsn) and is_refused_login(exc))

    def _note_error(self, exc: Exception) -> None:
        connections = self._connections
        if connections is not None and isinstance(exc, self._errors) and invalidates_all(exc):
            connections.invalidate_all()

    def _running(self, purpose: str) -> Connections:
        if self._connections is None:
            raise NotStartedError(f"cannot {purpose}: {_NOT_STARTED}")
        check_loop(self._connections.loop)
        return self._connections


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Refuses a call on another event loop than the one of startup().

    Raises:
        NotStartedError: It is another one.
    """
    try:
        is_another = asyncio.get_running_loop() is not loop
    except RuntimeError:  # nothing is awaited here, so nothing is used yet
        is_another = False
    if is_another:
        raise NotStartedError(
            f"startup() was on another event loop ({loop!r}): call `await startup()` on the one "
            "that uses it, when the other has ended, or make a broker or result backend for each"
        )


def _place_of(dsn: DsnSource | None, engine: AsyncEngine | None) -> str:
    """Where the server is, as far as that is known before the first connection."""
    if engine is not None:
        url = engine.url
        return f"{url.host}:{url.port or 5432}" if url.host else ""
    return "" if dsn is None or callable(dsn) else parse_dsn(dsn).place
