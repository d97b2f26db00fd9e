"""The role that a worker runs as needs these rights and no others."""

from contextlib import suppress
from typing import Any

import asyncpg
import pytest

from taskiq_sa_pg import SchemaError, StorageError, TaskStatus
from taskiq_sa_pg.statements import beat
from taskiq_sa_pg.timings import Timings
from tests.conftest import shut_down
from tests.faults.conftest import Start
from tests.faults.servers import PASSWORD, Server, ask
from tests.tasks import progress_of, result_of

TABLES = [f"taskiq_results{suffix}" for suffix in ("", "_progress", "_status", "_workers")]
RIGHTS = ["SELECT", "INSERT", "UPDATE", "DELETE"]


@pytest.fixture
async def dsn(server: Server) -> str:
    """The address of a role with these rights."""
    await ask(server.dsn, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    with suppress(asyncpg.UndefinedObjectError):
        await ask(server.dsn, "DROP OWNED BY worker")
        await ask(server.dsn, "DROP ROLE worker")
    await ask(server.dsn, f"CREATE ROLE worker LOGIN PASSWORD '{PASSWORD}'")
    await ask(server.dsn, "GRANT USAGE ON SCHEMA public TO worker")
    await ask(server.dsn, f"GRANT {', '.join(RIGHTS)} ON {', '.join(TABLES)} TO worker")
    return server.dsn.replace("//postgres:", "//worker:")


async def use(start: Start, dsn: str, driver: str, **options: Any) -> None:
    """Everything that a backend does."""
    keeper = await start(dsn, driver=driver, track="started", **options)
    taker = await start(dsn, driver=driver, keep_results=False, **options)
    try:
        for state in ("queued", "started"):
            await keeper.set_status(TaskStatus("task", state))
        assert (await keeper.get_status("task")).state == "started"
        await keeper.set_progress("task", progress_of(1))
        await keeper.set_progress("task", progress_of(2))
        await keeper.set_result("task", result_of(1))
        await keeper.set_result("task", result_of(2))
        assert (await keeper.get_progress("task")).meta == 2
        assert (await keeper.wait_result("task", timeout=10)).return_value == 2
        assert await keeper.is_result_ready("task")
        assert (await taker.get_result("task")).return_value == 2
        beating = {"of_worker": "us", "age": 1.0, "is_first": True, "is_own_name": True}
        workers = keeper.models.workers_table
        await keeper.runtime.database.fetch(beat(workers), beating, "beat")
        assert [each.worker for each in await keeper.get_workers()] == ["us"]
    finally:
        await shut_down([keeper, taker])


async def test_these_rights_are_enough(dsn: str, driver: str, start: Start) -> None:
    await use(start, dsn, driver)


async def test_each_of_these_rights_is_needed(server: Server, dsn: str, start: Start) -> None:
    for table in TABLES:
        for right in RIGHTS:
            await ask(server.dsn, f"REVOKE {right} ON {table} FROM worker")
            missing = f"`GRANT {right} ON public.{table} TO worker`"
            with pytest.raises(SchemaError, match=missing):
                await use(start, dsn, "asyncpg")
            denied = "permission denied .* grant the role SELECT, INSERT"
            with pytest.raises(StorageError, match=denied):
                await use(start, dsn, "asyncpg", check_schema="off")
            await ask(server.dsn, f"GRANT {right} ON {table} TO worker")
    await use(start, dsn, "asyncpg")


async def test_a_password_that_was_replaced_is_asked_for_again(
    server: Server, dsn: str, driver: str, start: Start
) -> None:
    """By a callable that knows the new one; without a callable there is nobody to ask."""
    passwords = iter([PASSWORD, PASSWORD, "outdated", "outdated", PASSWORD])
    last = [""]

    def rotating() -> str:
        last[0] = next(passwords, last[0])
        return dsn.replace(PASSWORD, last[0]).replace("postgresql:", f"postgresql+{driver}:")

    nothing_kept = Timings(keep_connection=0)
    backend = await start(rotating, pool_recycle=0, notify=False, timings=nothing_kept)
    await backend.set_result("task", result_of(1))
    assert (await backend.get_result("task")).return_value == 1
    assert backend.stats().retries == 2
    refused = rf"password authentication failed .*\(at 127.0.0.1:{server.port}\); correct the user"
    with pytest.raises(StorageError, match=refused):
        await start(dsn.replace(PASSWORD, "outdated"), driver=driver)
