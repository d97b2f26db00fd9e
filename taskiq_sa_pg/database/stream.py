"""Reads rows in batches from a server-side cursor."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from sqlalchemy import Select, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncResult
from sqlalchemy.util import greenlet_spawn

from taskiq_sa_pg.database.connections import MAX_SECONDS_TO_CLOSE, Connections
from taskiq_sa_pg.database.direct import time_limit
from taskiq_sa_pg.exceptions import NotStartedError


class Stream:
    """A statement's rows in batches, on a separate connection and in one transaction.

    A batch has at most `size` rows and takes at most `timeout` seconds; after the last one, it is
    empty.
    """

    def __init__(self, connections: Connections, size: int, timeout: float) -> None:
        self._connections = connections
        self._size = size
        self._timeout = timeout
        self._stack = AsyncExitStack()
        self._result: AsyncResult[Any] | None = None  # while it is open
        # A driver connection cannot be closed safely while another task waits for its answer.
        self._lock = asyncio.Lock()

    async def open(self, statement: Select[Any], seconds: float) -> Sequence[Any]:
        """Runs the statement and returns the first batch.

        The time limit applies to connecting, and again to the statement.
        """
        cursors: list[Any] = []

        def note_cursor(_connection: Any, cursor: Any, *_: Any) -> None:
            cursors.append(cursor)

        async with AsyncExitStack() as stack:
            # Runs last, after the connection is closed.
            stack.push_async_callback(_close, cursors)
            # Cursors need a transaction, and the engine's default may be AUTOCOMMIT.
            connection, _ = await stack.enter_async_context(
                self._connections.detached("READ COMMITTED", seconds)
            )
            event.listen(connection.sync_connection, "before_cursor_execute", note_cursor)
            async with time_limit(seconds):
                options = {"yield_per": self._size}
                result = await connection.stream(statement, execution_options=options)
                rows: Sequence[Any] = await result.fetchmany(self._size)
            self._stack, self._result = stack.pop_all(), result
        return rows

    async def next(self) -> Sequence[Any]:
        """Returns the next batch.

        Raises:
            NotStartedError: The stream was closed.
        """
        async with self._lock:
            if self._result is None:
                raise NotStartedError("the result backend was shut down while results were read")
            async with time_limit(self._timeout):
                return await self._result.fetchmany(self._size)

    async def close(self) -> None:
        """Ends the transaction and closes the connection, once no batch is being read."""
        async with self._lock:
            self._result = None
            await self._stack.aclose()


async def _close(cursors: Sequence[Any]) -> None:
    # psycopg warns about those that stay open, and SQLAlchemy leaves that of a cancelled statement
    # open. Errors do not matter: the connection is closed.
    for cursor in cursors:
        with suppress(SQLAlchemyError, OSError):
            async with time_limit(MAX_SECONDS_TO_CLOSE):
                await greenlet_spawn(cursor.close)
