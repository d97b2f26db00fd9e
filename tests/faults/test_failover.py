"""Several hosts: a standby that is promoted, and a primary that becomes read-only."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest
from demo import workers

from tests.faults.conftest import Start, make_tables
from tests.faults.drills import (
    HERE,
    IN_HAND,
    Ledger,
    environment,
    imported,
    make_queue,
    target,
)
from tests.faults.load import OFTEN, under_load
from tests.faults.servers import Programs, Server, ask, dsn_of, servers
from tests.tasks import result_of

Pair = tuple[Server, Server]

READ_WRITE = "?target_session_attrs=read-write"


@pytest.fixture(scope="module")
def by_role(programs: Programs) -> Iterator[list[Server]]:
    """The server that has the data first, whatever became of the other."""
    with servers(programs, 2) as made:
        yield made


@pytest.fixture
async def pair(by_role: list[Server]) -> AsyncIterator[Pair]:
    """A primary with empty tables and a standby, which is the primary afterwards."""
    primary, standby = by_role
    await make_tables(primary)
    await ask(primary.dsn, "TRUNCATE taskiq_results, taskiq_results_progress")
    await asyncio.to_thread(standby.make_standby_of, primary)
    yield primary, standby
    by_role.reverse()


@pytest.mark.parametrize(("driver", "is_borrowed"), [("asyncpg", True), ("psycopg", False)])
async def test_a_promoted_standby_has_all_that_was_acknowledged(
    driver: str, is_borrowed: bool, pair: Pair, start: Start
) -> None:
    primary, standby = pair
    await ask(primary.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'")
    await ask(primary.dsn, "SELECT pg_reload_conf()")

    async def fail_over() -> None:
        await asyncio.to_thread(primary.stop, signal.SIGQUIT)
        await asyncio.to_thread(standby.promote)

    dsn = dsn_of(primary.port, standby.port, options=READ_WRITE)
    backend = await start(dsn, driver=driver, is_borrowed=is_borrowed)
    account = await under_load(backend, fail_over)
    await account.assert_nothing_lost(standby.dsn)


@pytest.mark.parametrize(("driver", "is_borrowed"), [("asyncpg", False), ("psycopg", True)])
async def test_a_write_to_a_read_only_server_goes_to_the_primary(
    driver: str, is_borrowed: bool, pair: Pair, start: Start
) -> None:
    """Connections to the old primary stay alive and accept everything but writes."""
    old, new = pair

    async def demote() -> None:
        await ask(old.dsn, "ALTER SYSTEM SET default_transaction_read_only = on")
        await ask(old.dsn, "SELECT pg_reload_conf()")
        await asyncio.to_thread(new.promote)

    dsn = dsn_of(old.port, new.port, options=READ_WRITE)
    backend = await start(dsn, driver=driver, is_borrowed=is_borrowed, timings=OFTEN)
    account = await under_load(backend, demote)
    account.assert_nobody_failed()
    await backend.set_result("last", result_of("last"))
    assert await ask(new.dsn, "SELECT FROM taskiq_results WHERE task_id = 'last'")


async def test_a_promoted_standby_loses_no_task(pair: Pair) -> None:
    """With one driver: the other has its turn above."""
    primary, standby = pair
    await make_queue(primary.dsn)
    await ask(primary.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'")
    await ask(primary.dsn, "SELECT pg_reload_conf()")
    dsn = dsn_of(primary.port, standby.port, options=READ_WRITE)
    ledger = Ledger(dsn)
    with (
        environment(dsn, "psycopg", lease=2),
        imported() as tasks,
        workers(*target(), cwd=HERE, count=1, stop_timeout=0),
    ):
        await tasks.broker.startup()
        sent = [await tasks.work.kiq(0.02) for _ in range(100)]
        await ledger.wait_for_runs(sent, 10)
        await asyncio.to_thread(primary.stop, signal.SIGQUIT)
        sending = [asyncio.create_task(tasks.work.kiq()) for _ in range(20)]
        await asyncio.to_thread(standby.promote)
        sent += await asyncio.gather(*sending)
        counts = await ledger.count_when_done(sent)
        await tasks.broker.shutdown()
    assert min(counts.values()) == 1
    assert sum(counts.values()) - len(sent) <= IN_HAND
