"""The settings that a driver needs behind a PgBouncer in transaction mode, and the wrong ones."""

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import NullPool, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from taskiq_sa_pg import (
    ConfigurationError,
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    StorageError,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database
from tests.integration.engines import make
from tests.pooler import PREPARED
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

REMEDIES = {
    "asyncpg": 'connect_args={"statement_cache_size": 0}',
    "psycopg": 'connect_args={"prepare_threshold": None}',
}

each_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


def address(database: Database, driver: str, *, prepare: bool) -> str:
    assert database.pooler is not None
    return database.pooler.dsn(database.schema, driver, prepare=prepare)


async def call_everything(backend: Backend, times: int = 30) -> None:
    """On several connections at once, and each statement often enough to be prepared."""
    for _ in range(times):
        task_ids = [new_id() for _ in range(5)]
        await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in task_ids])
        await asyncio.gather(
            *[backend.set_progress(i, progress_of(i)) for i in task_ids],
            *[backend.is_result_ready(i) for i in task_ids],
            *[backend.get_progress(i) for i in task_ids],
        )
        results = await asyncio.gather(*[backend.get_result(i) for i in task_ids])
        assert [result.return_value for result in results] == task_ids


@each_driver
@pytest.mark.parametrize("keep_results", [True, False])
async def test_without_prepared_statements_everything_works(
    driver: str, keep_results: bool, old: Database, start_backend: BackendFactory
) -> None:
    dsn = address(old, driver, prepare=False)
    backends = [await start_backend(dsn, keep_results=keep_results) for _ in range(3)]
    await asyncio.gather(*map(call_everything, backends))


async def test_nothing_stays_prepared(old: Database, start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend(old.dsn, keep_results=False)
    await call_everything(backend)
    await backend.shutdown()
    clients = [await asyncpg.connect(old.dsn, statement_cache_size=0) for _ in range(2)]
    sessions = set()
    for client in clients:
        # Held, so that each has a server of its own.
        await client.execute("BEGIN")
        sessions.add(await client.fetchval("SELECT pg_backend_pid()"))
        assert await client.fetch("SELECT name FROM pg_prepared_statements WHERE name <> ''") == []
    assert len(sessions) == 2
    for client in clients:
        await client.close()


@each_driver
@pytest.mark.parametrize("keep_results", [True, False])
async def test_an_engine_of_the_backend_s_own_finds_out(
    driver: str, keep_results: bool, old: Database, start_backend: BackendFactory
) -> None:
    dsn = old.dsn_of(driver)
    backends = [await start_backend(dsn, keep_results=keep_results) for _ in range(3)]
    await asyncio.gather(*map(call_everything, backends))


@each_driver
async def test_a_pooler_that_comes_to_an_address_is_found(driver: str, old: Database) -> None:
    """Nobody restarts us: only the connections are new."""
    assert old.pooler is not None
    server = {"port": "5432", **make_url(old.server_dsn).query}
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        lead(root, Path(f"{server['host']}/.s.PGSQL.{server['port']}"))
        dsn = f"postgresql+{driver}://postgres@/postgres?host={root}&port=6432"
        engine = make_engine(dsn, poolclass=NullPool)
        assert await prepares(engine)
        lead(root, old.pooler.socket)
        assert [await prepares(engine) for _ in range(2)] == [False, False]
        await engine.dispose()


def lead(root: str, target: Path) -> None:
    socket = Path(root, ".s.PGSQL.6432")
    socket.unlink(missing_ok=True)
    socket.symlink_to(target)


async def prepares(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if isinstance(driver, asyncpg.Connection):
            return bool(driver._stmt_cache_enabled)
        return driver.prepare_threshold is not None


@each_driver
async def test_an_engine_that_prepares_statements_is_refused_at_startup(
    driver: str, old: Database, start_backend: BackendFactory
) -> None:
    engine = make(old.dsn_of(driver), connect_args=dict([PREPARED[driver]]))
    with pytest.raises(ConfigurationError) as caught:
        await start_backend(engine=engine)
    assert REMEDIES[driver] in str(caught.value)
    await engine.dispose()
    engine = make(old.dsn_of(driver))
    backend: Backend = await start_backend(engine=engine)
    await call_everything(backend, times=3)
    await backend.shutdown()
    await engine.dispose()


@each_driver
async def test_a_broker_refuses_such_an_engine_too(driver: str, old: Database) -> None:
    engine = make(old.dsn_of(driver), connect_args=dict([PREPARED[driver]]))
    broker = SQLAlchemyBroker(engine=engine)
    with pytest.raises(ConfigurationError) as caught:
        await broker.startup()
    assert REMEDIES[driver] in str(caught.value)
    await engine.dispose()


@each_driver
async def test_prepared_statements_that_get_lost_are_an_error_that_says_what_to_set(
    driver: str, old: Database, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """They are prepared where the address says so, whatever stands between."""
    caplog.set_level(logging.DEBUG, "taskiq_sa_pg")
    await start_backend(old.dsn_of(driver))
    dsn = address(old, driver, prepare=True)

    async def use() -> None:
        backend: Backend = await start_backend(dsn, run_migrations=False)
        await call_everything(backend)

    answers = await asyncio.gather(*[use() for _ in range(3)], return_exceptions=True)
    errors = [answer for answer in answers if isinstance(answer, StorageError)]
    assert errors
    assert [str(error) for error in errors if REMEDIES[driver] not in str(error)] == []
    assert "retrying" not in caplog.text


@each_driver
async def test_a_setting_that_pgbouncer_refuses_is_named_at_startup(
    driver: str, database: Database, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {
        "asyncpg": {"server_settings": {"statement_timeout": "1000"}},
        "psycopg": {"options": "-c statement_timeout=1000"},
    }
    with pytest.raises(StorageError) as caught:
        await start_backend(database.dsn_of(driver), connect_args=arguments[driver])
    for part in (
        "unsupported startup parameter",
        "remove it from the dsn",
        "ignore_startup_parameters",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "retrying" not in caplog.text


@each_driver
async def test_a_user_whom_pgbouncer_does_not_know_is_no_passing_fault(
    driver: str, database: Database, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    assert database.pooler is not None
    with pytest.raises(StorageError, match="no such user"):
        await start_backend(database.pooler.dsn("nobody_at_all", driver))
    assert "retrying" not in caplog.text
