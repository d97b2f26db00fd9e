"""task_router(): a router for FastAPI that serves results."""

from typing import Annotated, Any, Final

try:
    from fastapi import APIRouter, Query, Request, Response
except ImportError as exc:
    raise ImportError(
        "taskiq_sa_pg.fastapi needs FastAPI: pip install 'taskiq-sa-pg[fastapi]'", name=exc.name
    ) from exc

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.endpoints import (
    EventResponse,
    MayList,
    MaySee,
    Problem,
    TaskAnswer,
    TaskEndpoints,
    TaskError,
    TaskPage,
    TaskQuery,
    Unknown,
)

__all__ = ["TaskAnswer", "TaskError", "TaskPage", "task_router"]

_ACCEPTED: Final = {"model": TaskAnswer, "description": "The task has not finished"}
_FORBIDDEN: Final = {"model": Problem, "description": "The tasks may not be listed"}
_NOT_FOUND: Final = {"model": Problem, "description": "No such task"}
_EXPIRED: Final = {"model": Problem, "description": "The result has expired"}
_UNAVAILABLE: Final = {"model": Problem, "description": "The results cannot be read now"}
_EVENTS: Final = "Events `progress`, beginning with the current one, then `result` or `gone`"
_HAS_RESULT: Final = "No content: the client has already received the last event"


def task_router(
    backend: SQLAlchemyResultBackend[Any],
    *,
    may_see: MaySee | None = None,
    may_list: MayList | None = None,
    unknown: Unknown = "not_found",
    retry_after: int = 1,
    heartbeat: float = 15.0,
    **options: Any,
) -> APIRouter:
    """Returns a router that serves results and progress of a backend, which must be started.

        app.include_router(task_router(backend, may_see=may_see), prefix="/tasks")

    `GET /{task_id}` returns a TaskAnswer: status 200 if the task has finished, 202 if not. Errors
    are 404 if the task is unknown, 410 if its result has expired, and 503 (which is logged) if
    PostgreSQL is unreachable. `GET /{task_id}/events` is a stream of server-sent events:
    `progress`, then `result`. `GET /` lists finished tasks as a TaskPage. No request deletes
    anything, even with keep_results=False. The routes are named "get_task", "stream_events" and
    "list_tasks".

    Args:
        backend: Your result backend.
        may_see: Called with the request and a task id; returns whether this client may see the
            task. If not, the response is 404, as for an unknown task. It is not called for ids
            that the column cannot store, and gets UUIDs with dashes. It may be async; otherwise it
            runs in a thread. It may raise HTTPException. None allows all clients that know the
            task id and pass the router's dependencies.
        may_list: Called with the request; returns True, False (the response is 403), or a
            condition on backend.models.Result that limits the list. None omits `GET /`.
        unknown: The response if nothing is stored for a task: "not_found" is 404, "pending" is
            202. Use "pending" with a backend without track= if may_see knows which tasks were
            sent.
        retry_after: Seconds in the header `Retry-After` of 202 and 503.
        heartbeat: Seconds without an event after which a stream sends a comment, so that proxies
            keep the connection open.
        **options: Passed to APIRouter: `dependencies`, `prefix`, `tags` and so on.

    Raises:
        ConfigurationError: An argument is invalid.
    """
    endpoints = TaskEndpoints(
        backend,
        may_see=may_see,
        may_list=may_list,
        unknown=unknown,
        retry_after=retry_after,
        heartbeat=heartbeat,
    )
    router = APIRouter(**options)
    of_task: dict[int | str, dict[str, Any]] = {404: _NOT_FOUND, 410: _EXPIRED}

    @router.get(
        "/{task_id}",
        response_model=TaskAnswer,
        responses={202: _ACCEPTED, **of_task, 503: _UNAVAILABLE},
    )
    async def get_task(request: Request, task_id: str) -> Response:
        return await endpoints.get_task(request, task_id)

    @router.get(
        "/{task_id}/events",
        status_code=200,
        response_class=EventResponse,
        response_description=_EVENTS,
        responses={204: {"description": _HAS_RESULT}, **of_task},
    )
    async def stream_events(request: Request, task_id: str) -> Response:
        return await endpoints.stream_events(request, task_id)

    if may_list is not None:

        @router.get("/", response_model=TaskPage, responses={403: _FORBIDDEN, 503: _UNAVAILABLE})
        async def list_tasks(request: Request, query: Annotated[TaskQuery, Query()]) -> Response:
            return await endpoints.list_tasks(request, query)

    return router
