"""What the tests of endpoints share: an application of each framework, served in this process."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.fastapi import task_router
from taskiq_sa_pg.starlette import task_routes
from tests.conftest import eventually

Backend = SQLAlchemyResultBackend[Any]
App = FastAPI | Starlette
Event = tuple[str, Any]

FRAMEWORKS = ("fastapi", "starlette")


def make_app(backend: Backend, framework: str = "fastapi", **options: Any) -> App:
    """An application whose tasks are at /tasks."""
    if framework == "starlette":
        return Starlette(routes=[Mount("/tasks", routes=task_routes(backend, **options))])
    app = FastAPI()
    app.include_router(task_router(backend, **options), prefix="/tasks")
    return app


@asynccontextmanager
async def client_of(app: App) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application, with no server between; its errors are raised."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@asynccontextmanager
async def server_of(app: Any) -> AsyncIterator[uvicorn.Server]:
    """uvicorn with no limit to how long it waits for open responses."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())

    async def is_started() -> bool:
        assert not serving.done(), "uvicorn did not start"
        return server.started

    await eventually(is_started)
    try:
        yield server
    finally:
        server.should_exit = True
        async with asyncio.timeout(10):
            await serving


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, which uvicorn serves."""
    async with server_of(app) as server, client_to(server) as client:
        yield client


@asynccontextmanager
async def client_to(server: uvicorn.Server) -> AsyncIterator[httpx.AsyncClient]:
    address, port = server.servers[0].sockets[0].getsockname()
    url = f"http://{address}:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=10, verify=False) as client:  # noqa: S501
        yield client


async def events_of(response: httpx.Response) -> AsyncGenerator[Event, None]:
    """The events of a stream, each its name and its data; a comment is named ":"."""
    name = ""
    async for line in response.aiter_lines():
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == ":":
            yield ":", None
        elif field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


async def follow(client: httpx.AsyncClient, task_id: str, **options: Any) -> list[Event]:
    """All events of a task, to the end of the stream."""
    async with client.stream("GET", f"/tasks/{task_id}/events", **options) as response:
        assert response.status_code == 200
        return [event async for event in events_of(response)]
