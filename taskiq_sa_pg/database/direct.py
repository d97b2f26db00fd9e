"""How a statement in AUTOCOMMIT runs on a connection: through SQLAlchemy, or straight to asyncpg.

SQLAlchemy's execution takes a lone caller a quarter of what its statement takes, so it is left out
where the driver is asyncpg and nobody listens to the engine.
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

# The drivers ask the server to cancel a statement and wait for its answer: psycopg for 10 s, unless
# it is interrupted again.
SECONDS_TO_GIVE_UP: Final = 1.0

# Of a statement; of one that SQLAlchemy makes for several rows, those of each row.
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
    """Runs statements on a connection, as SQLAlchemy does."""

    def __init__(self, connection: AsyncConnection, driver: Any) -> None:
        self.connection: Final = connection
        self.is_closed: Final = is_closed_of(driver)
        self.opened_at = self.answered_at = asyncio.get_running_loop().time()
        self._is_autocommit = False

    async def fetch(
        self, statement: Executable, parameters: Parameters, deadline: float
    ) -> Sequence[Any]:
        """The rows of a statement, until the deadline by the event loop's clock."""
        async with time_limit(deadline - asyncio.get_running_loop().time()):
            if not self._is_autocommit:
                await set_isolation_level(self.connection, "AUTOCOMMIT")
                self._is_autocommit = True
            result = await self.connection.execute(statement, parameters)
            return result.all() if result.returns_rows else ()

    def is_unusable_after(self, exc: BaseException) -> bool:
        """Whether nobody must use the connection again, beside what SQLAlchemy judges itself."""
        if is_stale_plan(exc):
            return True
        # A value that asyncpg cannot encode leaves the server in the middle of a transaction. Its
        # error has no severity, as one of the server's own has.
        said = getattr(getattr(exc, "orig", None), "__cause__", None)
        return getattr(said, "severity", "") is None


class _Text(NamedTuple):
    """A compiled statement, for asyncpg."""

    text: str
    names: Sequence[str]  # of its parameters, in their order
    own: Mapping[str, Any]  # the values of those that are in the statement itself
    conversions: Sequence[tuple[int, Callable[[Any], Any]]]  # by position: what a type does


# The compiled statements of an engine; None for one that SQLAlchemy completes as it executes it:
# with a default that it computes, or with the values of an IN.
Texts = dict[Executable, _Text | None]


class DirectExecution(Execution):
    """Runs statements past SQLAlchemy, on asyncpg's connection `driver`."""

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
                # As where SQLAlchemy executes.
                raise StatementError(str(exc), compiled.text, None, exc) from exc
        # asyncpg gives up when it is cancelled once, and a second timer can be felt.
        async with asyncio.timeout_at(deadline):
            rows: Sequence[Any] = await self._driver.fetch(compiled.text, *values)
        return rows

    def is_unusable_after(self, exc: BaseException) -> bool:
        """As Execution.is_unusable_after()."""
        # Only after an error of the server's own is it sure that nothing is left to be read, or
        # where nothing was sent.
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
    """Whether nobody can notice that statements go past SQLAlchemy."""
    sync_engine = engine.sync_engine
    return (
        engine.dialect.driver == "asyncpg"
        and not sync_engine.logger.isEnabledFor(logging.INFO)  # echo=True, too
        and "schema_translate_map" not in sync_engine.get_execution_options()
        and not any(getattr(sync_engine.dispatch, name) for name in _ENGINE_EVENTS)
        and not any(getattr(engine.dialect.dispatch, name) for name in _DIALECT_EVENTS)
    )


def is_closed_of(driver: Any) -> Callable[[], bool]:
    """What tells whether the server or the driver has closed a connection of the driver's."""
    is_closed: Callable[[], bool]
    is_closed = driver.is_closed if hasattr(driver, "is_closed") else lambda: bool(driver.closed)
    return is_closed


async def set_isolation_level(connection: AsyncConnection, level: IsolationLevel) -> None:
    """Sets a connection's isolation level, until it goes back to its pool."""
    # SQLAlchemy sets it back as the connection returns to the pool, so a borrowed engine's other
    # users never meet it. It would not after a cancellation in the middle, and where the engine
    # sets the level as it connects (engine.execution_options), it would lose the connection.
    try:
        if connection.in_transaction():  # a listener of engine_connect has run a statement
            await connection.commit()
        _ = await connection.execution_options(isolation_level=level)
    except BaseException:
        await connection.invalidate()
        raise


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Cancels what takes longer, and again where it does not end at once; yields how to lift it."""
    async with (
        asyncio.timeout(seconds + SECONDS_TO_GIVE_UP) as last_limit,
        asyncio.timeout(seconds) as limit,
    ):

        def lift() -> None:
            limit.reschedule(None)
            last_limit.reschedule(None)

        yield lift
