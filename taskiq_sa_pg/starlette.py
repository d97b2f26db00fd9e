"""task_routes(): routes for Starlette that serve results."""

from typing import Any

try:
    from starlette.routing import Route
except ImportError as exc:
    raise ImportError(
        "taskiq_sa_pg.starlette needs Starlette: pip install starlette", name=exc.name
    ) from exc

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.endpoints import MayList, MaySee, TaskEndpoints, TaskQuery, Unknown

__all__ = ["task_routes"]


def task_routes(
    backend: SQLAlchemyResultBackend[Any],
    *,
    may_see: MaySee | None = None,
    may_list: MayList | None = None,
    unknown: Unknown = "not_found",
    retry_after: int = 1,
    heartbeat: float = 15.0,
) -> list[Route]:
    """Returns routes that serve the tasks of a backend; mount them at any path.

        Starlette(routes=[Mount("/tasks", routes=task_routes(backend, may_see=may_see))])

    They are named "get_task", "stream_events" and "list_tasks". Their responses and the arguments
    are those of taskiq_sa_pg.fastapi.task_router().

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

    async def get_task(request: Request) -> Response:
        return await endpoints.get_task(request, request.path_params["task_id"])

    async def stream_events(request: Request) -> Response:
        return await endpoints.stream_events(request, request.path_params["task_id"])

    async def list_tasks(request: Request) -> Response:
        return await endpoints.list_tasks(request, _query_of(request))

    routes = [
        Route("/{task_id}", get_task),
        Route("/{task_id}/events", stream_events),
    ]
    if may_list is not None:
        routes.append(Route("/", list_tasks))
    for route in routes:
        route.methods = {"GET"}  # without HEAD, which Starlette adds: a stream does not end
    return routes


def _query_of(request: Request) -> TaskQuery:
    given = request.query_params
    values = {
        name: given.getlist(name) if name in {"label", "argument"} else given[name]
        for name in TaskQuery.model_fields
        if name in given
    }
    try:
        return TaskQuery.model_validate(values)
    except ValidationError as exc:
        flaws = [f"{'.'.join(map(str, flaw['loc']))}: {flaw['msg']}" for flaw in exc.errors()]
        raise HTTPException(422, "; ".join(flaws)) from exc
