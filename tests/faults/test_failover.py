"""Several hosts: a standby that is promoted, and a primary that becomes read-only."""

import asyncio
import signal

import pytest

from tests.faults.conftest import Start
from tests.faults.load import under_load
from tests.faults.servers import ask, dsn_of, servers
from tests.tasks import result_of

READ_WRITE = "?target_session_attrs=read-write"


async def test_a_promoted_standby_has_all_that_was_acknowledged(driver: str, start: Start) -> None:
    with servers(2) as [primary, standby]:
        await asyncio.to_thread(standby.make_standby_of, primary)
        await asyncio.to_thread(standby.start)
        await ask(primary.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        await ask(primary.dsn, "SELECT pg_reload_conf()")

        async def fail_over() -> None:
            await asyncio.to_thread(primary.stop, signal.SIGQUIT)
            await asyncio.to_thread(standby.promote)

        backend = await start(dsn_of(primary.port, standby.port, options=READ_WRITE), driver=driver)
        account = await under_load(backend, fail_over)
        await account.assert_nothing_lost(standby.dsn)
        await backend.shutdown()


@pytest.mark.parametrize("is_borrowed", [False, True], ids=["owned", "borrowed"])
async def test_a_write_to_a_read_only_server_goes_to_the_primary(
    driver: str, start: Start, is_borrowed: bool
) -> None:
    """Connections to the old primary stay alive and accept everything but writes."""
    with servers(2) as [old, new]:
        await asyncio.to_thread(new.make_standby_of, old)
        await asyncio.to_thread(new.start)
        backend = await start(
            dsn_of(old.port, new.port, options=READ_WRITE), driver=driver, is_borrowed=is_borrowed
        )
        await asyncio.gather(*[backend.set_result(f"{i}", result_of(i)) for i in range(200)])

        async def demote() -> None:
            await ask(old.dsn, "ALTER SYSTEM SET default_transaction_read_only = on")
            await ask(old.dsn, "SELECT pg_reload_conf()")
            await asyncio.to_thread(new.promote)

        account = await under_load(backend, demote)
        account.assert_nobody_failed()
        await backend.set_result("last", result_of("last"))
        assert await ask(new.dsn, "SELECT FROM taskiq_results WHERE task_id = 'last'")
        await backend.shutdown()
