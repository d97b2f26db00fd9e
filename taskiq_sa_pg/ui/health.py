"""Whether the dashboard works, for whoever watches over it."""

import asyncio
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import select_nothing

# As long as probes wait.
_SECONDS: Final = 3

_STATEMENT: Final = select_nothing()


class Health:
    """Whether PostgreSQL answers; nothing more is told, for anybody may ask.

    Those who ask at the same time share an answer, so that they take one connection at most.
    """

    def __init__(self, backend: SQLAlchemyResultBackend[Any]) -> None:
        self._backend = backend
        self._asked: asyncio.Task[bool] | None = None

    async def answer(self, _: Request) -> Response:
        """200 if it does, and 503 if not."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._ask())
        ok = await asyncio.shield(self._asked)  # the others wait for it, too
        return JSONResponse({"ok": ok}, 200 if ok else 503)

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(_SECONDS):
                database = self._backend.runtime.database
                await database.fetch(_STATEMENT, {}, "see whether it answers", retry_timeout=0)
        except (TaskiqSaPgError, TimeoutError):
            return False
        return True
