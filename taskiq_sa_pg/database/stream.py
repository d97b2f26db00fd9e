"""Rows that a server-side cursor holds back until they are asked for."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from sqlalchemy import Select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncResult

from taskiq_sa_pg.database.connections import MAX_SECONDS_TO_CLOSE, Connections
from taskiq_sa_pg.database.direct import time_limit
from taskiq_sa_pg.exceptions import NotStartedError


class Stream:
    """A statement's rows, in batches, on a connection and in a transaction of its own.

    A batch has at most `size` rows, and takes at most `timeout` seconds. The next one after the end
    is empty.
    """

    def __init__(self, connections: Connections, size: int, timeout: float) -> None:
        self._connections = connections
        self._size = size
        self._timeout = timeout
        self._stack = AsyncExitStack()
        self._result: AsyncResult[Any] | None = None  # while it is open
        # A driver's connection cannot be closed safely while another task waits for its answer.
        self._lock = asyncio.Lock()

    async def open(self, statement: Select[Any], seconds: float) -> Sequence[Any]:
        """Runs the statement, and returns the first rows.

        The way to the connection may take so many seconds, and so may the statement.
        """
        async with AsyncExitStack() as stack:
            # Explicitly: there are no cursors in AUTOCOMMIT, which may be the engine's default.
            connection, _ = await stack.enter_async_context(
                self._connections.detached("READ COMMITTED", seconds)
            )
            async with time_limit(seconds):
                options = {"yield_per": self._size}
                result = await connection.stream(statement, execution_options=options)
                stack.push_async_callback(_close, result)
                rows: Sequence[Any] = await result.fetchmany(self._size)
            self._stack, self._result = stack.pop_all(), result
        return rows

    async def next(self) -> Sequence[Any]:
        """The next rows.

        Raises:
            NotStartedError: It was closed.
        """
        async with self._lock:
            if self._result is None:
                raise NotStartedError("the result backend was shut down while results were read")
            async with time_limit(self._timeout):
                return await self._result.fetchmany(self._size)

    async def close(self) -> None:
        """Ends the transaction and closes the connection, as soon as nothing runs on it."""
        async with self._lock:
            self._result = None
            await self._stack.aclose()


async def _close(result: AsyncResult[Any]) -> None:
    # psycopg complains of cursors that are left open. Whatever goes wrong here, the connection is
    # closed next.
    with suppress(SQLAlchemyError, OSError):
        async with time_limit(MAX_SECONDS_TO_CLOSE):
            await result.close()
