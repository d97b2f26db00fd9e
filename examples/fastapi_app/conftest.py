"""Fixtures of the shop's tests: a database, its tables, workers and a web server."""

import asyncio
import importlib
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
import pytest_asyncio
import uvicorn
from demo import workers
from sqlalchemy import make_url

from tests import conftest
from tests.commands import run_alembic
from tests.conftest import eventually

PROJECT = Path(__file__).parent
ADMIN_PASSWORD = "Zoë's"  # noqa: S105 - of the tests alone

server_dsn = conftest.server_dsn

Event = tuple[str, Any]


@asynccontextmanager
async def empty_database(server_dsn: str) -> AsyncIterator[str]:
    """The address of a new database; it is dropped at the end, with all its connections."""
    name = f"shop_{uuid4().hex}"
    await execute(server_dsn, f"CREATE DATABASE {name}")
    try:
        yield make_url(server_dsn).set(database=name).render_as_string(hide_password=False)
    finally:
        await execute(server_dsn, f"DROP DATABASE {name} WITH (FORCE)")


async def execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def alembic(dsn: str, *arguments: str) -> str:
    """Runs an Alembic command on the database, and returns its output."""

    def run() -> str:
        with project(dsn):
            return run_alembic(*arguments, location=str(PROJECT / "shop" / "migrations"))

    return await asyncio.to_thread(run)


@contextmanager
def project(dsn: str) -> Iterator[None]:
    """Makes the shop's modules importable, for this database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKIQ_SA_PG_DSN", dsn)
        patch.setenv("ADMIN_PASSWORD", ADMIN_PASSWORD)
        # Last, because the project also has a folder `tests`.
        patch.setattr(sys, "path", [*sys.path, str(PROJECT)])
        forget_modules()  # another `shop` may be loaded, from a test of the command line
        yield
        forget_modules()


def forget_modules() -> None:
    """Forgets the shop's modules, so that the next import loads them again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def dsn(server_dsn: str) -> AsyncIterator[str]:
    """A database with the shop's tables, set in the environment, and two worker processes."""
    async with empty_database(server_dsn) as dsn:
        await alembic(dsn, "upgrade", "head")
        with project(dsn), workers("shop.tasks:broker", cwd=PROJECT, stop_timeout=0):
            yield dsn


@pytest.fixture(scope="module")
def shop(dsn: str) -> ModuleType:
    """The module `shop.app`, with that database."""
    return importlib.import_module("shop.app")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(shop: ModuleType) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shop, which uvicorn serves in this process."""
    server = uvicorn.Server(uvicorn.Config(shop.app, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())

    async def is_started() -> bool:
        assert not serving.done(), "uvicorn did not start"
        return server.started

    await eventually(is_started, 30)
    address, port = server.servers[0].sockets[0].getsockname()
    async with httpx.AsyncClient(base_url=f"http://{address}:{port}", timeout=30) as client:
        yield client
    server.should_exit = True
    await serving


@contextmanager
def web_process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """uvicorn in a separate process."""
    command = [sys.executable, "-m", "uvicorn", "shop.app:app", f"--port={port}"]
    with subprocess.Popen([*command, "--log-level=warning"], cwd=PROJECT) as process:
        try:
            yield process
        finally:
            process.kill()


async def is_served(client: httpx.AsyncClient) -> bool:
    """Whether the web server answers."""
    try:
        return (await client.get("/")).status_code == 200
    except httpx.ConnectError:
        return False


async def place_order(client: httpx.AsyncClient, quantity: int, customer: str = "Ada") -> str:
    """The path of the order's task."""
    response = await client.post("/orders", json={"customer": customer, "quantity": quantity})
    assert response.status_code == 202, response.text
    return response.headers["Location"]


async def stream(client: httpx.AsyncClient, task: str) -> AsyncGenerator[Event, None]:
    """The events of a task: name and data; for progress, its meta."""
    async with client.stream("GET", f"{task}/events") as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        name = ""
        async for line in response.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                told = json.loads(value)
                yield name, told["meta"] if name == "progress" else told


@asynccontextmanager
async def packing_stopped(dsn: str) -> AsyncIterator[None]:
    """Tasks stop at their next progress, which cannot be stored; reading still works."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE taskiq_results_progress IN SHARE MODE")
            yield
    finally:
        await connection.close()
