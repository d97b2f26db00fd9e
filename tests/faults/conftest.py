"""Fixtures of the faults: servers of their own, and backends that leak nothing under them."""

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.engines import make_engine
from tests.conftest import assert_nothing_checked_out, shut_down
from tests.faults.servers import PASSWORD, Server, ask, servers

Backend = SQLAlchemyResultBackend[Any]
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with servers() as [server]:
        yield server


@pytest.fixture
async def server(shared_server: Server) -> Server:
    """A server that runs, with empty tables."""
    await ask(shared_server.dsn, "DROP SCHEMA public CASCADE")
    await ask(shared_server.dsn, "CREATE SCHEMA public")
    return shared_server


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def start(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Start]:
    """Starts backends; at the end none holds a connection, and no log tells the password."""
    started: list[Backend] = []
    engines: list[AsyncEngine] = []

    async def start(
        dsn: str, *, driver: str = "asyncpg", is_borrowed: bool = False, **kwargs: Any
    ) -> Backend:
        dsn = dsn.replace("postgresql://", f"postgresql+{driver}://", 1)
        kwargs.setdefault("run_migrations", True)
        if is_borrowed:
            engines.append(make_engine(dsn))
            backend = Backend(engine=engines[-1], **kwargs)
        else:
            backend = Backend(dsn, **kwargs)
        await backend.startup()
        started.append(backend)
        return backend

    yield start
    await shut_down(started)
    for engine in engines:
        assert_nothing_checked_out(engine)
        await engine.dispose()
    logged = [record for record in caplog.get_records("call") if record.name != "asyncio"]
    assert PASSWORD not in "".join(record.getMessage() for record in logged)
    assert [r.getMessage() for r in logged if r.levelno >= logging.ERROR] == []
