"""TaskEndpoints: answers HTTP requests about tasks, independently of the framework."""

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
# The same for an unknown task, a task that the client may not see, and an invalid id.
_NOT_FOUND: Final = (404, "no such task", _NO_STORE)
# The id of a stream's last event: a browser that reconnects with it has received all events.
_LAST: Final = "last"


class TaskEndpoints:
    """Answers requests about the tasks of one backend. The arguments are those of task_router().

    Raises:
        ConfigurationError: An argument is invalid.
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
        """Returns a task's result (200) or its status (202).

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
        """Returns server-sent events: a task's progress, then its result.

        Raises:
            HTTPException: 404 or 410.
        """
        if request.headers.get("Last-Event-ID") == _LAST:
            return Response(status_code=204, headers=_NO_STORE)  # EventSource then stops
        task_id = await self._check(request, task_id)
        try:
            await self._read_status(task_id)
        except StorageError as exc:
            # After a 503, EventSource would stop; after an empty stream, it reconnects.
            logger.error("cannot stream events of task %r: %s", task_id, exc)  # noqa: TRY400 - the text is enough
            return EventResponse()
        find_end = partial(self._find_end, task_id)
        return EventResponse(self._events(task_id), heartbeat=self._heartbeat, find_end=find_end)

    async def list_tasks(self, request: Request, query: TaskQuery) -> Response:
        """Returns a page of finished tasks.

        Raises:
            HTTPException: 403, 422 or 503.
        """
        assert self._may_list is not None
        visible = await _call(self._may_list, request)
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
        """Returns the id as the column stores it, if the client may see the task.

        Raises:
            HTTPException: 404.
        """
        try:
            task_id = str(self._backend.models.config.to_column_task_id(task_id))
        except InvalidTaskIdError:
            raise HTTPException(*_NOT_FOUND) from None
        if self._may_see is not None and not await _call(self._may_see, request, task_id):
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
                continue  # deleted meanwhile; the next status shows it
            if details.undecodable is not None:
                logger.error("task %r: %s", task_id, details.undecodable)
            return finished(details)

    async def _read_status(self, task_id: str) -> tuple[TaskStatus, Progress | None]:
        """Returns a task's status; its progress only if the status is unknown.

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
            logger.error("task %r: %s", task_id, exc)  # noqa: TRY400 - the text is enough
            return None
        return None if progress is None else Progress(state=progress.state, meta=progress.meta)

    async def _events(self, task_id: str) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._backend.watch_progress(task_id)) as changes:
                async for each in changes:
                    progress = Progress(state=each.state, meta=each.meta)
                    yield encode_event("progress", to_json(progress).decode())
        except ResultDecodeError as exc:
            logger.error("task %r: %s", task_id, exc)  # noqa: TRY400 - the text is enough
        try:
            answer = await self._look(task_id)
        except HTTPException as exc:
            yield _gone(exc)
        else:
            # Else it is being retried, or its progress cannot be decoded: the browser reconnects.
            if answer.finished_at is not None:
                yield encode_event("result", to_json(answer).decode(), event_id=_LAST)

    async def _find_end(self, task_id: str) -> bytes | None:
        """Returns the last event if the task is gone; deleting a task sends no notification."""
        if self._backend.track is None:
            return None  # a running task may be unknown, for example if it was acknowledged early
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
            logger.error("cannot read tasks: %s", exc)  # noqa: TRY400 - the text is enough
            detail = "the results cannot be read now"
            raise HTTPException(503, detail, _NO_STORE | self._retry_after) from None


def _gone(exc: HTTPException) -> bytes:
    return encode_event("gone", json.dumps({"detail": exc.detail}), event_id=_LAST)


async def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of the application; in a thread if it is not async, like FastAPI."""
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    answer = await asyncio.to_thread(function, *arguments)
    return await answer if inspect.isawaitable(answer) else answer


def _response(
    answer: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(to_json(answer), status, _NO_STORE | (headers or {}), "application/json")
