"""The role that a worker runs as needs these rights and no others."""

from contextlib import suppress

import asyncpg
import pytest

from taskiq_sa_pg import StorageError
from tests.conftest import shut_down
from tests.faults.conftest import Start
from tests.faults.servers import PASSWORD, Server, ask
from tests.tasks import progress_of, result_of

TABLES = ["taskiq_results", "taskiq_results_progress"]
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


async def use(start: Start, dsn: str, driver: str) -> None:
    """Everything that a backend does."""
    keeper = await start(dsn, driver=driver)
    taker = await start(dsn, driver=driver, keep_results=False)
    try:
        await keeper.set_progress("task", progress_of(1))
        await keeper.set_progress("task", progress_of(2))
        await keeper.set_result("task", result_of(1))
        await keeper.set_result("task", result_of(2))
        assert (await keeper.get_progress("task")).meta == 2
        assert (await keeper.wait_result("task", timeout=10)).return_value == 2
        assert await keeper.is_result_ready("task")
        assert (await taker.get_result("task")).return_value == 2
    finally:
        await shut_down([keeper, taker])


async def test_these_rights_are_enough(dsn: str, driver: str, start: Start) -> None:
    await use(start, dsn, driver)


async def test_each_of_these_rights_is_needed(server: Server, dsn: str, start: Start) -> None:
    for table in TABLES:
        for right in RIGHTS:
            await ask(server.dsn, f"REVOKE {right} ON {table} FROM worker")
            denied = "permission denied .* grant the role SELECT, INSERT"
            with pytest.raises(StorageError, match=denied):
                await use(start, dsn, "asyncpg")
            await ask(server.dsn, f"GRANT {right} ON {table} TO worker")
    await use(start, dsn, "asyncpg")
