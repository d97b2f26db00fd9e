"""Fixtures of the faults: servers of their own, and backends that leak nothing under them."""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.embedded import postgres
from taskiq_sa_pg.timings import DEFAULT_TIMINGS
from tests.conftest import assert_nothing_checked_out, shut_down
from tests.faults.servers import PASSWORD, Programs, Server, ask, servers

Backend = SQLAlchemyResultBackend[Any]
Start = Callable[..., Any]

DRIVERS = ["asyncpg", "psycopg"]


def by_turns(faults: Iterable[str]) -> Any:
    """Each fault with each driver, on an engine that is owned or borrowed, by turns."""
    pairs = [(f, d, (i + j) % 2 == 1) for i, f in enumerate(faults) for j, d in enumerate(DRIVERS)]
    ids = [f"{fault}-{driver}-{'borrowed' if b else 'owned'}" for fault, driver, b in pairs]
    return pytest.mark.parametrize(("fault", "driver", "is_borrowed"), pairs, ids=ids)


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> Iterator[Programs]:
    """Those of the tests' embedded server, or of one that is started for that."""
    if "TASKIQ_SA_PG_TEST_DSN" not in os.environ:
        yield Programs.of(request.getfixturevalue("server_dsn"))
        return
    with postgres() as server:
        yield Programs.of(server.dsn)


@pytest.fixture(scope="session")
def shared_server(programs: Programs) -> Iterator[Server]:
    with servers(programs) as [server]:
        yield server


@pytest.fixture
async def server(shared_server: Server) -> Server:
    """A server that runs, with empty tables."""
    shared_server.start()
    await make_tables(shared_server)
    await ask(shared_server.dsn, "TRUNCATE taskiq_results, taskiq_results_progress")
    return shared_server


async def make_tables(server: Server) -> None:
    backend = Backend(server.dsn, run_migrations=True)
    await backend.startup()
    await backend.shutdown()


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def start(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Start]:
    """Starts backends, with their arguments and `timings`.

    At the end none holds a connection, and no log tells the password.
    """
    started: list[Backend] = []
    engines: list[AsyncEngine] = []

    async def start(
        dsn: Any, *, driver: str = "asyncpg", is_borrowed: bool = False, **kwargs: Any
    ) -> Backend:
        if isinstance(dsn, str):
            dsn = dsn.replace("postgresql://", f"postgresql+{driver}://", 1)
        timings = kwargs.pop("timings", DEFAULT_TIMINGS)
        if is_borrowed:
            engines.append(make_engine(dsn))
            backend = Backend(engine=engines[-1], **kwargs)
        else:
            backend = Backend(dsn, **kwargs)
        backend.settings = replace(backend.settings, timings=timings)
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
