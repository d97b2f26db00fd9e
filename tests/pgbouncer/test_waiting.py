"""Waiting behind a PgBouncer in transaction mode, where LISTEN is accepted and hears nothing."""

import asyncio
from typing import Any

import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.timings import Timings
from tests.conftest import BackendFactory, Database, eventually
from tests.integration.engines import make
from tests.integration.waiters import SOON, heard_by, listener_of, until_waiting
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

each_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "taskiq_sa_pg.waiting.listener" and record.levelname == "WARNING"
    ]


@each_driver
async def test_listen_dsn_leads_past_it_to_the_server(
    driver: str,
    database: Database,
    start_backend: BackendFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What wakes the waiter is a notification: nobody looks before it would be too late."""
    listen_dsn = database.direct_dsn.replace("postgresql", f"postgresql+{driver}", 1)
    waiting: Backend = await start_backend(
        database.dsn_of(driver), listen_dsn=listen_dsn, timings=Timings(between_looks=600)
    )
    storing: Backend = await start_backend(database.dsn_of(driver))
    task_id = new_id()
    async with heard_by(waiting):
        waiter = asyncio.create_task(waiting.wait_result(task_id, timeout=SOON))
        await until_waiting(waiting, 2)
        await storing.set_result(task_id, result_of("heard"))
        assert (await waiter).return_value == "heard"
    assert warnings_in(caplog) == []


@each_driver
async def test_without_it_the_probe_finds_out_and_waiting_looks(
    driver: str,
    database: Database,
    start_backend: BackendFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Many times a second, not only at the regular looks; one warning says what to do about it."""
    timings = Timings(between_probes=0.5, between_looks=600)
    backend: Backend = await start_backend(database.dsn_of(driver), timings=timings)
    kept = asyncio.create_task(backend.wait_result(new_id()))

    async def is_warned() -> bool:
        return bool(warnings_in(caplog))

    await eventually(is_warned)
    for _ in range(5):
        task_id = new_id()
        waiter = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
        await until_waiting(backend, 2)
        await backend.set_result(task_id, result_of("seen"))
        assert (await waiter).return_value == "seen"
    [warning] = warnings_in(caplog)
    assert "the connection delivers no notifications" in warning
    assert "listen_dsn=" in warning
    assert not listener_of(backend).is_healthy
    kept.cancel()
    await asyncio.wait([kept])


@each_driver
async def test_it_never_counts_as_heard(
    driver: str,
    database: Database,
    start_backend: BackendFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Though the servers tell the engine's connections of probes that were sent before."""
    caplog.set_level("DEBUG", "taskiq_sa_pg.waiting.listener")
    engine = make(database.dsn_of(driver), pool_size=2)
    timings = Timings(between_probes=0.1, first_reconnect=0.001, last_reconnect=0.01)
    backend: Backend = await start_backend(engine=engine, timings=timings)
    kept = asyncio.create_task(backend.wait_result(new_id()))

    async def is_given_up_often() -> bool:
        assert not listener_of(backend).is_healthy
        return caplog.text.count("delivers no notifications") >= 10

    await eventually(is_given_up_often)
    assert len(warnings_in(caplog)) == 1
    kept.cancel()
    await asyncio.wait([kept])
    await backend.shutdown()
    await engine.dispose()


async def test_progress_is_followed_by_looks(
    database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(database.dsn, timings=Timings(between_looks=600))
    task_id = new_id()
    seen: dict[Any, Any] = {}

    async def follow() -> None:
        async for progress in backend.watch_progress(task_id, timeout=SOON):
            seen[progress.meta] = progress.state

    following = asyncio.create_task(follow())
    for value in range(3):
        await backend.set_progress(task_id, progress_of(value))

        async def is_seen(value: int = value) -> bool:
            return value in seen

        await eventually(is_seen)
    await backend.set_result(task_id, result_of(None))
    await following
    assert list(seen) == [0, 1, 2]
