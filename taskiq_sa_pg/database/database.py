"""Runs statements and transactions on an AsyncEngine, owned or borrowed, with retries."""

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

from taskiq_sa_pg.database.connections import Connections, check_loop, dispose, disposing
from taskiq_sa_pg.database.direct import Parameters, time_limit
from taskiq_sa_pg.database.dsn import DsnSource
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
    is_transient,
    is_wrong_password,
    name_server,
)
from taskiq_sa_pg.database.place import Place
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
    "not started: call `await broker.startup()` first, or `await backend.startup()` if you use a "
    "result backend without a broker"
)

_IS_REPLICA: Final = "the server is a read replica (a hot standby), which has no notifications"

_T = TypeVar("_T")


class Database:
    """Runs statements on an engine, and retries them after transient errors.

    An engine passed as `engine` is borrowed: it is never disposed. An engine for a DSN is owned:
    open() creates it, close() disposes it. The arguments are those of the backend.

    Methods that run statements raise NotStartedError if the database is not open, and StorageError
    if PostgreSQL refuses a statement or cannot be reached in time. Their `purpose` completes the
    error's "cannot ...": "store the result of ...". Their `retry_timeout` overrides the
    constructor's.

    Raises:
        ConfigurationError: Neither a DSN nor an engine, both, an invalid DSN, or an engine that is
            not an AsyncEngine on PostgreSQL.
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
                "give either dsn= (an engine is created for it) or engine= (your own, which is "
                "never disposed)"
            )
        if engine is not None:
            check_engine(engine, engine_kwargs)
        # A callable is called when a connection is needed.
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
        self._by_listen_dsn: Connections | None = None  # while a connection listens there
        self._place = Place(engine or dsn or "", (engine_kwargs or {}).get("connect_args"))
        self._listen_place = self._place if listen_dsn is None else Place(listen_dsn)
        self._retry = Retry(
            retry_timeout,
            command_timeout,
            should_retry=self._should_retry,
            on_retry=on_retry,
            on_error=self._note_error,
            place=lambda: self._place.servers,
        )
        self._command_timeout = command_timeout
        self._connections: Connections | None = None  # while it is open
        self._errors: tuple[type[Exception], ...] = ()
        self._disposal: AsyncGenerator[None, None] | None = None
        self._streams: set[Stream] = set()
        self._alike: WeakSet[Engine] = WeakSet()  # for which may_be_of() was True

    @property
    def is_open(self) -> bool:
        """Whether it is open, on this event loop."""
        connections = self._connections
        return connections is not None and connections.loop is asyncio.get_running_loop()

    @property
    def is_owned(self) -> bool:
        """Whether the engine was created for a DSN, and is disposed by close()."""
        return self._borrowed is None

    @property
    def engine(self) -> AsyncEngine:
        """The engine.

        Raises:
            NotStartedError: The database is not open.
        """
        if self._connections is None:
            raise NotStartedError(_NOT_STARTED)
        return self._connections.engine

    @property
    def place(self) -> str:
        """`host:port/database`, for repr() and messages; empty if it is not known yet."""
        return str(self._place)

    @property
    def command_timeout(self) -> float:
        """Seconds that one attempt may take."""
        return self._command_timeout

    @property
    def kept(self) -> int:
        """The number of connections that are checked out and idle."""
        return 0 if self._connections is None else self._connections.kept

    @property
    def streams(self) -> int:
        """The number of open server-side cursors."""
        return len(self._streams)

    def name_server(self, exc: Exception) -> str:
        """The part of an error's text that names the server; empty if not about connecting."""
        return name_server(exc, self._place.servers)

    def leads_where(self, other: "Database") -> bool:
        """Whether this one can use the other one's connections instead of its own."""
        if self._listen_dsn not in (None, other._listen_dsn):
            return False
        if self._borrowed is not None:
            return self._borrowed is other._borrowed
        return self._dsn == other._dsn and self._engine_kwargs in ({}, other._engine_kwargs)

    def may_be_of(self, engine: Engine) -> bool:
        """Whether an application's engine connects to this database, judged by its URL."""
        own = self._borrowed or self._dsn
        if engine not in self._alike and (callable(own) or may_be_of(own, engine)):
            self._alike.add(engine)
        return engine in self._alike

    def schema_of(self, schema: str | None) -> str | None:
        """The real schema behind a name, according to the engine's `schema_translate_map`.

        SQLAlchemy translates statements, but not values such as names in the system catalogue.
        """
        schemas = self.engine.sync_engine.get_execution_options().get("schema_translate_map") or {}
        found: str | None = schemas.get(schema, schema)
        return found

    async def open(
        self, timings: Timings = DEFAULT_TIMINGS, *, retry_timeout: float | None = None
    ) -> bool:
        """Creates the engine if needed, without connecting; returns False if already open.

        Raises:
            NotStartedError: It is open on another event loop that still runs.
            StorageError: The callable that returns the DSN has raised.
        """
        if self.is_open:
            return False
        if self._connections is not None:
            if self._connections.is_running:
                raise NotStartedError(
                    "the connections are in use on another event loop that still runs "
                    f"({self._connections.loop!r}): create a broker or result backend for each "
                    "event loop, or call `await shutdown()` on the other one first"
                )
            await self._connections.abandon()
        engine = self._borrowed
        if engine is None:
            engine = await self._make_engine(retry_timeout)
        # The application shares a borrowed engine's pool: return connections after each statement.
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
            return make_engine(self._place.noting(self._dsn), **self._engine_kwargs)

        try:
            # Not self._retry, which notes whether the server was ever reached.
            return await Retry(DEFAULT_RETRY_TIMEOUT).run(attempt, retry_timeout)
        except NoAddressError as exc:
            raise StorageError(*describe(exc, "create an engine")) from exc

    async def close(self) -> None:
        """Closes the connections, and disposes an owned engine; repeated calls do nothing."""
        connections, self._connections = self._connections, None
        disposal, self._disposal = self._disposal, None
        streams, self._streams = self._streams, set()
        if connections is None:
            return
        if connections.loop is not asyncio.get_running_loop():
            # Connections of another loop cannot be closed here: leave them to garbage collection.
            await connections.abandon()
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
        """Runs one statement in AUTOCOMMIT, in one round trip, and returns its rows.

        The compiled form is cached by the statement object, so pass the same object each time.
        """

        async def attempt(seconds: float) -> Sequence[Any]:
            return await self._running(purpose).fetch(statement, parameters, seconds)

        try:
            return await self._retry.run(attempt, retry_timeout)
        except self._errors as exc:
            raise self._storage_error(exc, purpose) from exc

    async def fetch_all(
        self, calls: Sequence[tuple[Executable, Parameters]], purpose: str
    ) -> Sequence[Any]:
        """Runs statements with their parameters in one transaction; returns all their rows."""
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
        """Calls `work` in one transaction: committed at the end, rolled back by an exception.

        If the connection is lost during the COMMIT, its outcome is unknown. With `is_answer_final`
        the value that `work` returned is then used; otherwise `work` is called again.
        `is_limited=False` removes the time limit of an attempt, except for connecting.
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
                logger.warning("the connection was lost during the COMMIT that was to %s", purpose)
            return answers[0]

        try:
            return await self._retry.run(attempt, retry_timeout)
        except self._errors as exc:
            raise self._storage_error(exc, purpose) from exc

    async def stream(
        self, statement: Select[Any], size: int, purpose: str
    ) -> AsyncGenerator[Sequence[Any], None]:
        """Yields the rows of a statement in batches of `size`, from a server-side cursor.

        It uses a separate connection, because the consumer may be slow. Closing the generator
        closes the connection. Transient errors are retried until the first batch has arrived.
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
            raise self._storage_error(exc, purpose) from exc

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Any]:
        """A driver connection for LISTEN, outside of the pool; to listen_dsn if there is one.

        Raises:
            StorageError: PostgreSQL cannot be reached, or is a read replica (READ_ONLY).
        """
        purpose = "listen for notifications"
        connections, engine = self._running(purpose), None
        if self._listen_dsn is not None:
            source = self._listen_place.noting(self._listen_dsn)
            engine = make_engine(source, "listen_dsn", pool_size=1)
            connections = self._by_listen_dsn = Connections(engine, 1, keep=False)
        try:
            async with AsyncExitStack() as stack:
                detached = connections.detached("AUTOCOMMIT", self._command_timeout)
                connection, driver = await stack.enter_async_context(detached)
                async with time_limit(self._command_timeout):
                    # On a replica, each LISTEN would write an error to the server's log.
                    if await connection.scalar(select(func.pg_is_in_recovery())):
                        raise StorageError(f"cannot {purpose}: {_IS_REPLICA}", READ_ONLY)
                keep_notifications(driver)
                yield driver
        except errors_of(connections.engine) as exc:
            raise StorageError(*describe(exc, purpose, self._listen_place.servers)) from exc
        finally:
            if engine is not None:
                self._by_listen_dsn = None
                await dispose(engine)

    async def fetch_by_listen_dsn(
        self, statement: Executable, parameters: Parameters, purpose: str
    ) -> Sequence[Any]:
        """Runs a statement once at listen_dsn, while a connection listens there.

        Raises:
            StorageError: PostgreSQL failed; or there is no listen_dsn, so it is a read replica.
        """
        connections = self._by_listen_dsn
        if connections is None:
            raise StorageError(f"cannot {purpose}: {_IS_REPLICA}", READ_ONLY)
        try:
            return await connections.fetch(statement, parameters, self._command_timeout)
        except errors_of(connections.engine) as exc:
            raise StorageError(*describe(exc, purpose, self._listen_place.servers)) from exc

    def _storage_error(self, exc: Exception, purpose: str) -> StorageError:
        self._note_error(exc)
        return StorageError(*describe(exc, purpose, self._place.servers))

    def _should_retry(self, exc: Exception) -> bool:
        # The callable may return a new password by now.
        return is_transient(exc) or (callable(self._dsn) and is_wrong_password(exc))

    def _note_error(self, exc: Exception) -> None:
        connections = self._connections
        if connections is not None and isinstance(exc, self._errors) and invalidates_all(exc):
            connections.invalidate_all()

    def _running(self, purpose: str) -> Connections:
        if self._connections is None:
            raise NotStartedError(f"cannot {purpose}: {_NOT_STARTED}")
        check_loop(self._connections.loop)
        return self._connections
