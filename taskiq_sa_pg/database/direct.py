"""Runs a statement in AUTOCOMMIT on a connection: through SQLAlchemy, or directly with asyncpg.

For a single caller, SQLAlchemy's execution adds a quarter to the time of a statement. So it is
bypassed if the driver is asyncpg and the engine has no event listeners for statements.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from sqlalchemy import Dialect, Executable
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from taskiq_sa_pg.database.errors import is_stale_plan

# A cancelled driver asks the server to cancel the statement and waits for the answer: psycopg for
# 10 s, unless it is cancelled again.
SECONDS_TO_GIVE_UP: Final = 1.0

# Of a statement; or of each row, for a statement that SQLAlchemy builds for several rows.
Parameters = Mapping[str, Any] | list[dict[str, Any]]

_ENGINE_EVENTS: Final = (
    "before_execute",
    "after_execute",
    "before_cursor_execute",
    "after_cursor_execute",
    "begin",
)
_DIALECT_EVENTS: Final = ("do_execute", "do_execute_no_params", "handle_error")


class Execution:
    """Runs statements on a connection through SQLAlchemy."""

    def __init__(self, connection: AsyncConnection, driver: Any) -> None:
        self.connection: Final = connection
        self.is_closed: Final = is_closed_of(driver)
        self.opened_at = self.answered_at = asyncio.get_running_loop().time()
        self._is_autocommit = False

    async def fetch(
        self, statement: Executable, parameters: Parameters, deadline: float
    ) -> Sequence[Any]:
        """Runs a statement and returns its rows; the deadline is by the event loop's clock."""
        async with time_limit(deadline - asyncio.get_running_loop().time()):
            if not self._is_autocommit:
                await set_isolation_level(self.connection, "AUTOCOMMIT")
                self._is_autocommit = True
            result = await self.connection.execute(statement, parameters)
            return result.all() if result.returns_rows else ()

    def is_unusable_after(self, exc: BaseException) -> bool:
        """Whether the connection must not be used again, in addition to what SQLAlchemy detects."""
        if is_stale_plan(exc):
            return True
        # A value that asyncpg cannot encode leaves the server in the middle of a transaction.
        # Unlike the server's errors, that error has no severity.
        cause = getattr(getattr(exc, "orig", None), "__cause__", None)
        return getattr(cause, "severity", "") is None


class _Text(NamedTuple):
    """A compiled statement, for asyncpg."""

    text: str
    names: Sequence[str]  # of the parameters, in order
    own: Mapping[str, Any]  # the values that are part of the statement
    conversions: Sequence[tuple[int, Callable[[Any], Any]]]  # position and the type's conversion


# The compiled statements of an engine. None for one that SQLAlchemy completes at execution: with a
# computed default, or with the values of an IN.
Texts = dict[Executable, _Text | None]


class DirectExecution(Execution):
    """Runs statements directly on asyncpg's connection `driver`."""

    def __init__(self, connection: AsyncConnection, driver: Any, texts: Texts) -> None:
        super().__init__(connection, driver)
        self._driver = driver
        self._texts = texts

    async def fetch(
        self, statement: Executable, parameters: Parameters, deadline: float
    ) -> Sequence[Any]:
        """As Execution.fetch().

        Raises:
            StatementError: A value cannot be converted.
        """
        if isinstance(parameters, list):
            return await super().fetch(statement, parameters, deadline)
        try:
            compiled = self._texts[statement]
        except KeyError:
            compiled = self._texts[statement] = _compile(statement, self.connection.dialect)
        if compiled is None:
            return await super().fetch(statement, parameters, deadline)
        if compiled.own:
            parameters = {**compiled.own, **parameters}
        values = list(map(parameters.__getitem__, compiled.names))
        for position, convert in compiled.conversions:
            try:
                values[position] = convert(values[position])
            except Exception as exc:
                # As SQLAlchemy does.
                raise StatementError(str(exc), compiled.text, None, exc) from exc
        # asyncpg stops at the first cancellation, and a second timer is measurably slower.
        async with asyncio.timeout_at(deadline):
            rows: Sequence[Any] = await self._driver.fetch(compiled.text, *values)
        return rows

    def is_unusable_after(self, exc: BaseException) -> bool:
        """As Execution.is_unusable_after()."""
        # It is usable after an error of the server, or if nothing was sent. Otherwise an answer
        # may be unread.
        is_known = getattr(exc, "severity", None) is not None or isinstance(exc, StatementError)
        return not is_known or self.is_closed() or super().is_unusable_after(exc)


def _compile(statement: Executable, dialect: Dialect) -> _Text | None:
    compiled: Any = statement.compile(dialect=dialect)  # type: ignore[attr-defined]  # the base lacks it
    if compiled.prefetch or compiled.post_compile_params:
        return None
    names = compiled.positiontup
    binds = compiled.binds
    processors = [binds[n].type.dialect_impl(dialect).bind_processor(dialect) for n in names]
    return _Text(
        compiled.string,
        names,
        {name: binds[name].effective_value for name in names if not binds[name].required},
        [(position, p) for position, p in enumerate(processors) if p is not None],
    )


def has_direct_path(engine: AsyncEngine) -> bool:
    """Whether bypassing SQLAlchemy has no visible effect: no echo, listener or schema map."""
    sync_engine = engine.sync_engine
    return (
        engine.dialect.driver == "asyncpg"
        and not sync_engine.logger.isEnabledFor(logging.INFO)  # echo=True, too
        and "schema_translate_map" not in sync_engine.get_execution_options()
        and not any(getattr(sync_engine.dispatch, name) for name in _ENGINE_EVENTS)
        and not any(getattr(engine.dialect.dispatch, name) for name in _DIALECT_EVENTS)
    )


def is_closed_of(driver: Any) -> Callable[[], bool]:
    """Returns a function that checks whether a driver connection is closed."""
    is_closed: Callable[[], bool]
    is_closed = driver.is_closed if hasattr(driver, "is_closed") else lambda: bool(driver.closed)
    return is_closed


async def set_isolation_level(connection: AsyncConnection, level: IsolationLevel) -> None:
    """Sets a connection's isolation level until it is returned to its pool."""
    # SQLAlchemy resets it then, so other users of a borrowed engine never see it. After a
    # cancellation in the middle it would not; and if the engine sets the level when it connects
    # (engine.execution_options), it would lose the connection.
    try:
        if connection.in_transaction():  # a listener of engine_connect has run a statement
            await connection.commit()
        _ = await connection.execution_options(isolation_level=level)
    except BaseException:
        await connection.invalidate()
        raise


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Cancels the block after some seconds, and again 1 s later; yields a function to lift it."""
    async with (
        asyncio.timeout(seconds + SECONDS_TO_GIVE_UP) as last_limit,
        asyncio.timeout(seconds) as limit,
    ):

        def lift() -> None:
            limit.reschedule(None)
            last_limit.reschedule(None)

        yield lift
