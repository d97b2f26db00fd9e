"""The role that a worker runs as needs these rights and no others."""

from contextlib import suppress

import asyncpg
import pytest

from taskiq_sa_pg import StorageError
from tests.faults.conftest import Start
from tests.faults.servers import PASSWORD, Server, ask
from tests.tasks import progress_of, result_of

TABLES = ["taskiq_results", "taskiq_results_progress"]
RIGHTS = ["SELECT", "INSERT", "UPDATE", "DELETE"]


@pytest.fixture
async def dsn(server: Server, start: Start) -> str:
    """The address of a role without any rights; the tables are there."""
    await start(server.dsn)
    await ask(server.dsn, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    with suppress(asyncpg.UndefinedObjectError):
        await ask(server.dsn, "DROP OWNED BY worker")
        await ask(server.dsn, "DROP ROLE worker")
    await ask(server.dsn, f"CREATE ROLE worker LOGIN PASSWORD '{PASSWORD}'")
    return server.dsn.replace("//postgres:", "//worker:")


async def grant(server: Server, *, without: tuple[str, str] | None = None) -> None:
    await ask(server.dsn, "GRANT USAGE ON SCHEMA public TO worker")
    for table in TABLES:
        rights = ", ".join(right for right in RIGHTS if (right, table) != without)
        await ask(server.dsn, f"GRANT {rights} ON {table} TO worker")


async def use(start: Start, dsn: str, driver: str) -> None:
    """Everything that a backend does."""
    keeper = await start(dsn, driver=driver, run_migrations=False)
    taker = await start(dsn, driver=driver, run_migrations=False, keep_results=False)
    await keeper.set_progress("task", progress_of(1))
    await keeper.set_progress("task", progress_of(2))
    await keeper.set_result("task", result_of(1))
    await keeper.set_result("task", result_of(2))
    assert (await keeper.get_progress("task")).meta == 2
    assert (await keeper.wait_result("task", timeout=10)).return_value == 2
    assert await keeper.is_result_ready("task")
    assert (await taker.get_result("task")).return_value == 2


async def test_these_rights_are_enough(server: Server, dsn: str, driver: str, start: Start) -> None:
    await grant(server)
    await use(start, dsn, driver)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("right", RIGHTS)
async def test_each_of_these_rights_is_needed(
    right: str, table: str, server: Server, dsn: str, start: Start
) -> None:
    await grant(server, without=(right, table))
    with pytest.raises(StorageError, match=r"permission denied .* grant the role SELECT, INSERT"):
        await use(start, dsn, "asyncpg")
