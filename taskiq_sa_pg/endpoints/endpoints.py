"""TaskEndpoints: what is answered to a request about tasks, whichever framework has routed it."""

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel
from sqlalchemy import ColumnExpressionArgument
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.endpoints.answers import (
    Progress,
    TaskAnswer,
    TaskPage,
    TaskQuery,
    TaskSummary,
    finished,
    to_json,
    unfinished,
)
from taskiq_sa_pg.endpoints.events import EventResponse, encode_event
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    InvalidTaskIdError,
    ResultDecodeError,
    ResultIsMissingError,
    StorageError,
    check_number,
    check_whole,
)
from taskiq_sa_pg.results import TaskStatus

logger = logging.getLogger(__name__)

Unknown = Literal["not_found", "pending"]
MaySee = Callable[[Request, str], bool | Awaitable[bool]]
Visible = bool | ColumnExpressionArgument[bool]
MayList = Callable[[Request], Visible | Awaitable[Visible]]

_NO_STORE: Final = {"Cache-Control": "no-store"}
# For an unknown task, one that may not be seen and an id that no task can have: all the same.
_NOT_FOUND: Final = (404, "no such task", _NO_STORE)
# The id of a stream's last event: a browser that comes back with it has everything.
_LAST: Final = "last"


class TaskEndpoints:
    """Answers requests about the tasks of one backend. Arguments as for task_router().

    Raises:
        ConfigurationError: An argument that cannot work.
    """

    def __init__(
        self,
        backend: SQLAlchemyResultBackend[Any],
        *,
        may_see: MaySee | None,
        may_list: MayList | None,
        unknown: Unknown,
        retry_after: int,
        heartbeat: float,
    ) -> None:
        if not isinstance(backend, SQLAlchemyResultBackend):
            raise ConfigurationError(f"backend must be a SQLAlchemyResultBackend, not {backend!r}")
        for name, function in (("may_see", may_see), ("may_list", may_list)):
            if function is not None and not callable(function):
                raise ConfigurationError(f"{name} must be a function or None, not {function!r}")
        if unknown not in get_args(Unknown):
            raise ConfigurationError(f'unknown must be "not_found" or "pending", not {unknown!r}')
        check_whole("retry_after", retry_after)
        check_number("heartbeat", heartbeat, 0, is_above=True)
        self._backend = backend
        self._may_see = may_see
        self._may_list = may_list
        self._unknown = unknown
        self._retry_after = {"Retry-After": str(retry_after)}
        self._heartbeat = heartbeat

    async def get_task(self, request: Request, task_id: str) -> Response:
        """A task's result (200), or its status (202).

        Raises:
            HTTPException: 404, 410 or 503.
        """
        task_id = await self._check(request, task_id)
        with self._storage():
            answer = await self._look(task_id)
        if answer.finished_at is not None:
            return _response(answer)
        return _response(answer, 202, self._retry_after)

    async def stream_events(self, request: Request, task_id: str) -> Response:
        """A task's progress, and then its result, as server-sent events.

        Raises:
            HTTPException: 404 or 410.
        """
        if request.headers.get("Last-Event-ID") == _LAST:
            return Response(status_code=204, headers=_NO_STORE)  # EventSource then gives up
        task_id = await self._check(request, task_id)
        try:
            await self._read_status(task_id)
        except StorageError as exc:
            # After a 503 EventSource would give up; after an empty stream it tries again.
            logger.error("no events of task %r: %s", task_id, exc)  # noqa: TRY400 - it says it all
            return EventResponse()
        find_end = partial(self._find_end, task_id)
        return EventResponse(self._events(task_id), heartbeat=self._heartbeat, find_end=find_end)

    async def list_tasks(self, request: Request, query: TaskQuery) -> Response:
        """A page of finished tasks.

        Raises:
            HTTPException: 403, 422 or 503.
        """
        assert self._may_list is not None
        visible = await _ask(self._may_list, request)
        if visible is False or visible is None:
            raise HTTPException(403, "not allowed", _NO_STORE)
        try:
            with self._storage():
                page = await self._backend.find(
                    () if visible is True else [visible],
                    window=query.window,
                    outcome=query.outcome,
                    name=query.name,
                    worker=query.worker,
                    label=query.labels,
                    argument=query.arguments,
                    after=query.after,
                    limit=query.limit,
                )
        except ValueError as exc:
            raise HTTPException(422, str(exc), _NO_STORE) from exc
        records = [TaskSummary.model_validate(record) for record in page.records]
        return _response(TaskPage(records=records, next=page.next))

    async def _check(self, request: Request, task_id: str) -> str:
        """The id as the column has it, of a task that may be seen.

        Raises:
            HTTPException: 404.
        """
        try:
            task_id = str(self._backend.models.config.to_column_task_id(task_id))
        except InvalidTaskIdError:
            raise HTTPException(*_NOT_FOUND) from None
        if self._may_see is not None and not await _ask(self._may_see, request, task_id):
            raise HTTPException(*_NOT_FOUND)
        return task_id

    async def _look(self, task_id: str) -> TaskAnswer:
        while True:
            status, progress = await self._read_status(task_id)
            if status.finished_at is None:
                return unfinished(status, progress or await self._read_progress(task_id))
            try:
                details = await self._backend.get_details(task_id, with_result=True)
            except ResultIsMissingError:
                continue  # it was deleted since, and the status says so now
            if details.undecodable is not None:
                logger.error("task %r: %s", task_id, details.undecodable)
            return finished(details)

    async def _read_status(self, task_id: str) -> tuple[TaskStatus, Progress | None]:
        """What is known of a task; its progress only where nothing else is.

        Raises:
            HTTPException: 404 or 410.
        """
        status = await self._backend.get_status(task_id)
        if status.state == "expired":
            raise HTTPException(410, "the result has expired", _NO_STORE)
        if status.state != "unknown":
            return status, None
        progress = await self._read_progress(task_id)
        if progress is None and self._unknown == "not_found":
            raise HTTPException(*_NOT_FOUND)
        return status, progress

    async def _read_progress(self, task_id: str) -> Progress | None:
        try:
            progress = await self._backend.get_progress(task_id)
        except ResultDecodeError as exc:
            logger.error("task %r: %s", task_id, exc)  # noqa: TRY400 - it says it all
            return None
        return None if progress is None else Progress(state=progress.state, meta=progress.meta)

    async def _events(self, task_id: str) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._backend.watch_progress(task_id)) as changes:
                async for each in changes:
                    progress = Progress(state=each.state, meta=each.meta)
                    yield encode_event("progress", to_json(progress).decode())
        except ResultDecodeError as exc:
            logger.error("task %r: %s", task_id, exc)  # noqa: TRY400 - it says it all
        try:
            answer = await self._look(task_id)
        except HTTPException as exc:
            yield _gone(exc)
        else:
            # Else it is tried again, or its progress could not be read: the browser comes back.
            if answer.finished_at is not None:
                yield encode_event("result", to_json(answer).decode(), event_id=_LAST)

    async def _find_end(self, task_id: str) -> bytes | None:
        """The last event of a task that is gone: nobody is notified of that."""
        if self._backend.track is None:
            return None  # one that runs may be unknown, such as one that was acknowledged before
        try:
            await self._read_status(task_id)
        except HTTPException as exc:
            return _gone(exc)
        return None

    @contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except StorageError as exc:
            logger.error("tasks cannot be read: %s", exc)  # noqa: TRY400 - it says it all
            detail = "the results cannot be read now"
            raise HTTPException(503, detail, _NO_STORE | self._retry_after) from None


def _gone(exc: HTTPException) -> bytes:
    return encode_event("gone", json.dumps({"detail": exc.detail}), event_id=_LAST)


async def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the application says; in a thread, as FastAPI does, if it is not async."""
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    answer = await asyncio.to_thread(function, *arguments)
    return await answer if inspect.isawaitable(answer) else answer


def _response(
    answer: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(to_json(answer), status, _NO_STORE | (headers or {}), "application/json")
