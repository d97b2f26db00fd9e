"""Fixtures of the dashboard's tests: a backend with JSON payloads, pages through ASGI."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from taskiq import TaskiqResult

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.codec import TaskMetadata, attach
from taskiq_sa_pg.ui import dashboard
from tests.conftest import Database, NewDatabase, shut_down
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]

ORIGIN = "http://tasks.test"
OWN = {"Origin": ORIGIN}


@asynccontextmanager
async def client_of(app: Any, base_url: str = f"{ORIGIN}/") -> AsyncIterator[httpx.AsyncClient]:
    """Asks an ASGI application; what it raises is an answer with status 500, as for a browser."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
        yield client


@pytest.fixture(scope="module")
def tables(new_database: NewDatabase) -> Iterator[Database]:
    """A schema with the tables of `backend`, which each test leaves empty."""
    database = new_database()

    async def make() -> None:
        await database.create()
        made = make_backend(database, run_migrations=True)
        await made.startup()
        await made.shutdown()

    asyncio.run(make())
    yield database
    asyncio.run(database.drop())


def make_backend(database: Database, **options: Any) -> Backend:
    """One with JSON payloads, and with statuses."""
    return SQLAlchemyResultBackend(
        database.dsn, field_for_payload="Jsonb", track="started", **options
    )


@pytest.fixture
async def backend(tables: Database) -> AsyncIterator[Backend]:
    """Started, with JSON payloads, and with statuses."""
    backend = make_backend(tables, check_schema="off")
    await backend.startup()
    backend.runtime.writer.awaits_middleware = False  # tests store what it would
    yield backend
    await shut_down([backend])
    await tables.fetch(
        "TRUNCATE taskiq_results, taskiq_results_progress, taskiq_results_status, "
        "taskiq_results_workers"
    )


@pytest.fixture
async def client(backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    """A user who may write."""
    async with client_of(dashboard(backend, authorize=lambda _: "write")) as client:
        yield client


@pytest.fixture
async def reader(backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    """A user who may only read."""
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        yield client


async def store(
    backend: Backend,
    value: Any = None,
    *,
    task_id: str | None = None,
    name: str | None = "shop:pack",
    worker: str | None = "worker-1",
    args: str | None = None,
    kwargs: str | None = None,
    waited: float = 2,
    **fields: Any,
) -> str:
    """Stores a result with what the middleware would record, args and kwargs as JSON."""
    result: TaskiqResult[Any] = result_of(value, **fields)
    if result.error is not None:
        result.is_err = True
    started_at = datetime.now(UTC) - timedelta(seconds=result.execution_time)
    queued_at = started_at - timedelta(seconds=waited)
    attach(result, TaskMetadata(name, args, kwargs, worker, queued_at, started_at))
    task_id = new_id() if task_id is None else task_id
    await backend.set_result(task_id, result)
    return task_id


def raised(error: BaseException) -> BaseException:
    """An exception that has a traceback."""
    try:
        raise error
    except type(error) as caught:
        return caught
