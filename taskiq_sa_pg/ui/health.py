"""The dashboard's health check, for monitoring."""

import asyncio
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import select_nothing

# Typical timeout of probes.
_SECONDS: Final = 3

_STATEMENT: Final = select_nothing()


class Health:
    """Reports whether PostgreSQL answers, and nothing else, because no permission is required.

    Concurrent requests share one query, so that they use at most one connection.
    """

    def __init__(self, backend: SQLAlchemyResultBackend[Any]) -> None:
        self._backend = backend
        self._running: asyncio.Task[bool] | None = None

    async def answer(self, _: Request) -> Response:
        """Returns 200 if PostgreSQL answers, otherwise 503."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._check())
        ok = await asyncio.shield(self._running)  # other requests wait for it, too
        return JSONResponse({"ok": ok}, 200 if ok else 503)

    async def _check(self) -> bool:
        try:
            async with asyncio.timeout(_SECONDS):
                database = self._backend.runtime.database
                await database.fetch(_STATEMENT, {}, "check the connection", retry_timeout=0)
        except (TaskiqSaPgError, TimeoutError):
            return False
        return True
