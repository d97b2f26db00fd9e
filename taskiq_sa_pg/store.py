"""The session layer: runs statements on an AsyncEngine that it owns or borrows."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from sqlalchemy import Executable, NullPool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskiq_sa_pg.connections import Connections
from taskiq_sa_pg.engines import DsnSource, check_dsn, make_engine
from taskiq_sa_pg.exceptions import ConfigurationError, NotStartedError, StorageError

DEFAULT_MAX_CONNECTIONS: Final = 4

# What a person can do about an SQLSTATE.
# https://www.postgresql.org/docs/18/errcodes-appendix.html
_REMEDIES: Final[Mapping[str, str]] = {
    "42P01": "make the tables with `alembic upgrade head`",
    "42703": "bring the tables up to date with `alembic upgrade head`",
    "42501": "grant the role SELECT, INSERT, UPDATE and DELETE on the table, "
    "and USAGE on its schema",
    "3D000": "create the database, or correct the dsn",
    "28P01": "correct user and password in the dsn",
}


class Store:
    """Runs statements on an engine, and says what went wrong with them.

    An engine that is given is borrowed: its pool is used and it is never disposed. One that is
    made from a DSN is owned: open() makes it, close() disposes it.

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
    ) -> None:
        _check_source(dsn, engine, engine_kwargs)
        if listen_dsn is not None:
            check_dsn(listen_dsn)
        if max_connections < 1:
            raise ConfigurationError(f"max_connections must be 1 or more, not {max_connections}")
        self._dsn = dsn
        self._borrowed = engine
        self._engine_kwargs = dict(engine_kwargs or {})
        self._max_connections = max_connections
        self._listen_dsn = listen_dsn
        self._engine: AsyncEngine | None = None
        self._connections: Connections | None = None
        self._errors: tuple[type[Exception], ...] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._disposal: AsyncGenerator[None, None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is open, on this event loop."""
        return self._engine is not None and self._loop is asyncio.get_running_loop()

    async def open(self) -> bool:
        """Gets the engine ready, unless it is; nothing connects yet.

        Returns:
            False if the store was open, on this event loop.

        Raises:
            ConfigurationError: The engine cannot be made with these arguments.
        """
        if self.is_open:
            return False
        if self._connections is not None:
            self._connections.abandon()
        is_owned = self._borrowed is None
        engine = self._borrowed or self._make_engine()
        # Others wait for a borrowed engine's connections: each goes back after its statement.
        connections = Connections(engine, self._max_connections, keep=is_owned)
        if is_owned:
            self._disposal = _disposing(engine, connections)
            await anext(self._disposal)
        self._engine, self._connections = engine, connections
        self._loop = asyncio.get_running_loop()
        self._errors = _errors_of(engine)
        return True

    async def close(self) -> None:
        """Disposes the engine if it is owned; repeated calls do nothing."""
        engine, self._engine = self._engine, None
        connections, self._connections = self._connections, None
        disposal, self._disposal = self._disposal, None
        if engine is None or connections is None:
            return
        if self._loop is not asyncio.get_running_loop():
            # Connections of another loop cannot be closed here; the garbage collector has them.
            connections.abandon()
            if disposal is not None:
                await engine.dispose(close=False)
        elif disposal is not None:
            await disposal.aclose()
        else:
            await connections.close()

    async def fetch(
        self, statement: Executable, parameters: Mapping[str, Any], purpose: str
    ) -> Sequence[Any]:
        """Runs one statement in AUTOCOMMIT, which is one round trip, and returns its rows.

        Args:
            statement: What to run. It is compiled once, so it must be an object that lasts.
            parameters: Its parameters, all of them.
            purpose: What errors say could not be done: "store the result of ...".

        Raises:
            NotStartedError: The store is not open.
            StorageError: PostgreSQL refused the statement or could not be reached.
        """
        try:
            return await self._running(purpose).fetch(statement, parameters)
        except self._errors as exc:
            raise StorageError(*_described(exc, purpose)) from exc

    @asynccontextmanager
    async def transaction(self, purpose: str) -> AsyncIterator[AsyncConnection]:
        """A connection in one transaction: committed at the end, rolled back by an exception.

        Raises:
            NotStartedError: The store is not open.
            StorageError: PostgreSQL refused a statement or could not be reached.
        """
        try:
            async with self._running(purpose).transaction() as connection:
                yield connection
        except self._errors as exc:
            raise StorageError(*_described(exc, purpose)) from exc

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Any]:
        """A connection of the driver's own, outside of every pool; closed at the end.

        It leads to listen_dsn where there is one.

        Raises:
            NotStartedError: The store is not open.
            StorageError: PostgreSQL could not be reached.
        """
        purpose = "listen for notifications"
        connections, engine = self._running(purpose), None
        if self._listen_dsn is not None:
            engine = make_engine(self._listen_dsn, poolclass=NullPool)
            connections = Connections(engine, 1, keep=False)
        errors = self._errors if engine is None else _errors_of(engine)
        try:
            async with connections.detached() as connection:
                yield connection
        except errors as exc:
            raise StorageError(*_described(exc, purpose)) from exc
        finally:
            if engine is not None:
                await engine.dispose()

    def _make_engine(self) -> AsyncEngine:
        assert self._dsn is not None
        return make_engine(self._dsn, **self._engine_kwargs)

    def _running(self, purpose: str) -> Connections:
        if self._connections is None:
            raise NotStartedError(
                f"cannot {purpose}: the result backend is not started. Call "
                "`await broker.startup()` (or the backend's own startup()) first"
            )
        return self._connections


def _check_source(
    dsn: DsnSource | None, engine: object, engine_kwargs: Mapping[str, Any] | None
) -> None:
    if (dsn is None) == (engine is None):
        raise ConfigurationError(
            "give either dsn= (the backend makes an engine of its own) or engine= (it uses "
            "yours and never disposes it)"
        )
    if dsn is not None:
        check_dsn(dsn)
    if engine is None:
        return
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(
            f"engine must be an AsyncEngine, as create_async_engine() makes it, not "
            f"{type(engine).__qualname__}"
        )
    if engine.dialect.name != "postgresql":
        raise ConfigurationError(
            f"engine must be one for PostgreSQL, not for {engine.dialect.name}"
        )
    if engine_kwargs:
        raise ConfigurationError(
            f"{', '.join(sorted(engine_kwargs))}: arguments for an engine go with dsn=; the "
            "engine that was given is used as it is"
        )


async def _disposing(engine: AsyncEngine, connections: Connections) -> AsyncGenerator[None, None]:
    # asyncio.run() and its like close the async generators of their event loop before the loop
    # itself, so connections that nobody shut down are closed while they still can be.
    try:
        yield
    finally:
        await connections.close()
        await engine.dispose()


def _errors_of(engine: AsyncEngine) -> tuple[type[Exception], ...]:
    errors: tuple[type[Exception], ...] = (DBAPIError, PoolTimeoutError, OSError)
    # The driver's own where SQLAlchemy is not asked to execute, and in 2.0 where it cannot connect.
    dbapi: Any = engine.dialect.dbapi
    asyncpg = getattr(dbapi, "asyncpg", None)
    if asyncpg is not None:
        return *errors, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
    return *errors, dbapi.Error


def _described(exc: Exception, purpose: str) -> tuple[str, str | None]:
    """The text and the SQLSTATE of a StorageError."""
    if isinstance(exc, PoolTimeoutError):
        return f"cannot {purpose}: no connection came free: {exc}", None
    if isinstance(exc, OSError):
        # asyncpg raises it bare where no server answers; a timeout has no text.
        said = str(exc) or type(exc).__name__
        return f"cannot {purpose}: no connection to PostgreSQL: {said}", None
    sqlstate = sqlstate_of(exc)
    remedy = _REMEDIES.get(sqlstate or "")
    said = reason_of(exc) + (f" ({sqlstate})" if sqlstate else "")
    return f"cannot {purpose}: {said}" + (f"; {remedy}" if remedy else ""), sqlstate


def sqlstate_of(error: Exception) -> str | None:
    """PostgreSQL's error code; None where the error came from the driver."""
    sqlstate: str | None = getattr(getattr(error, "orig", error), "sqlstate", None)
    return sqlstate


def reason_of(error: Exception) -> str:
    """What PostgreSQL or the driver said, in one line and without statement or parameters."""
    said = getattr(error, "orig", None) or error
    # SQLAlchemy's own exception for asyncpg puts the name of a class before the text.
    if isinstance(error, DBAPIError):
        said = said.__cause__ or said
    return str(said).strip().partition("\n")[0]
