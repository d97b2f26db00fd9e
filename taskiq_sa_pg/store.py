"""The session layer: runs statements on an AsyncEngine that it owns or borrows."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from sqlalchemy import Executable, Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskiq_sa_pg.engines import DsnSource, make_engine, parse_dsn
from taskiq_sa_pg.exceptions import ConfigurationError, NotStartedError, StorageError

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
    ) -> None:
        _check_source(dsn, engine, engine_kwargs)
        self._dsn = dsn
        self._borrowed = engine
        self._engine_kwargs = dict(engine_kwargs or {})
        self._engine: AsyncEngine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._disposal: AsyncGenerator[None, None] | None = None

    async def open(self) -> bool:
        """Gets the engine ready, unless it is; nothing connects yet.

        Returns:
            False if the store was open, on this event loop.

        Raises:
            ConfigurationError: The engine cannot be made with these arguments.
        """
        loop = asyncio.get_running_loop()
        if self._engine is not None and self._loop is loop:
            return False
        engine = self._borrowed
        if engine is None:
            assert self._dsn is not None
            engine = make_engine(self._dsn, **self._engine_kwargs)
            self._disposal = _disposing(engine)
            await anext(self._disposal)
        self._engine, self._loop = engine, loop
        return True

    async def close(self) -> None:
        """Disposes the engine if it is owned; repeated calls do nothing."""
        engine, self._engine = self._engine, None
        disposal, self._disposal = self._disposal, None
        if engine is None or disposal is None:
            return
        if self._loop is asyncio.get_running_loop():
            await disposal.aclose()
        else:
            # Connections of another loop cannot be closed here; the garbage collector has them.
            await engine.dispose(close=False)

    async def fetch(
        self, statement: Executable, parameters: Mapping[str, Any], purpose: str
    ) -> Sequence[Row[Any]]:
        """Runs one statement in AUTOCOMMIT, which is one round trip, and returns its rows.

        Args:
            statement: What to run.
            parameters: Its parameters.
            purpose: What errors say could not be done: "store the result of ...".

        Raises:
            NotStartedError: The store is not open.
            StorageError: PostgreSQL refused the statement or could not be reached.
        """
        async with self._connect("AUTOCOMMIT", purpose) as connection:
            result = await connection.execute(statement, parameters)
            return result.all() if result.returns_rows else ()

    @asynccontextmanager
    async def transaction(self, purpose: str) -> AsyncIterator[AsyncConnection]:
        """A connection in one transaction: committed at the end, rolled back by an exception.

        Raises:
            NotStartedError: The store is not open.
            StorageError: PostgreSQL refused a statement or could not be reached.
        """
        # READ COMMITTED explicitly: the engine's own default may be AUTOCOMMIT.
        async with self._connect("READ COMMITTED", purpose) as connection, connection.begin():
            yield connection

    @asynccontextmanager
    async def _connect(self, isolation_level: str, purpose: str) -> AsyncIterator[AsyncConnection]:
        engine = self._engine
        if engine is None:
            raise NotStartedError(
                f"cannot {purpose}: the result backend is not started. Call "
                "`await broker.startup()` (or the backend's own startup()) first"
            )
        with _translated(purpose, _driver_errors(engine)):
            async with engine.connect() as connection:
                yield await _at_isolation_level(connection, isolation_level)


def _check_source(
    dsn: DsnSource | None, engine: object, engine_kwargs: Mapping[str, Any] | None
) -> None:
    if (dsn is None) == (engine is None):
        raise ConfigurationError(
            "give either dsn= (the backend makes an engine of its own) or engine= (it uses "
            "yours and never disposes it)"
        )
    if dsn is not None and not callable(dsn):
        parse_dsn(dsn)
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


async def _at_isolation_level(connection: AsyncConnection, level: str) -> AsyncConnection:
    # SQLAlchemy sets it back as the connection returns to the pool, so a borrowed engine's other
    # users never meet it. It would not after a cancellation in the middle, and where the engine
    # sets the level as it connects (engine.execution_options), it would lose the connection.
    try:
        return await connection.execution_options(isolation_level=level)
    except BaseException:
        await connection.invalidate()
        raise


async def _disposing(engine: AsyncEngine) -> AsyncGenerator[None, None]:
    # asyncio.run() and its like close the async generators of their event loop before the loop
    # itself, so connections that nobody shut down are closed while they still can be.
    try:
        yield
    finally:
        await engine.dispose()


def _driver_errors(engine: AsyncEngine) -> tuple[type[Exception], ...]:
    # SQLAlchemy 2.0 lets asyncpg's own errors through where it cannot connect.
    asyncpg = getattr(engine.dialect.dbapi, "asyncpg", None)
    if asyncpg is None:
        return (DBAPIError,)
    return (
        DBAPIError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
    )


@contextmanager
def _translated(purpose: str, driver_errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except driver_errors as exc:
        sqlstate = sqlstate_of(exc)
        remedy = _REMEDIES.get(sqlstate or "")
        said = reason_of(exc) + (f" ({sqlstate})" if sqlstate else "")
        text = f"cannot {purpose}: {said}" + (f"; {remedy}" if remedy else "")
        raise StorageError(text, sqlstate) from exc
    except PoolTimeoutError as exc:
        raise StorageError(f"cannot {purpose}: no connection came free: {exc}", None) from exc
    except OSError as exc:
        # asyncpg raises it bare where no server answers; a timeout has no text.
        said = str(exc) or type(exc).__name__
        raise StorageError(f"cannot {purpose}: no connection to PostgreSQL: {said}", None) from exc


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
