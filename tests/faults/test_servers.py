"""Servers that restart, crash, are killed, close connections, have none left, or are locked."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import pytest

from tests.conftest import eventually
from tests.faults.conftest import Start, by_turns
from tests.faults.load import under_load
from tests.faults.outages import lock_the_table, restart, take_all_connections, terminate_often
from tests.faults.servers import Server

FAULTS: dict[str, Callable[[Server], Awaitable[None]]] = {
    "fast restart": lambda server: restart(server, signal.SIGINT),
    "crash": lambda server: restart(server, signal.SIGQUIT),
    "kill -9": lambda server: restart(server, signal.SIGKILL),
    "terminated connections": terminate_often,
    "no connections left": take_all_connections,
    "locked table": lock_the_table,
}


@by_turns(FAULTS)
async def test_no_result_is_lost_and_no_waiter_fails(
    fault: str, driver: str, is_borrowed: bool, server: Server, start: Start
) -> None:
    """Afterwards a borrowed engine has all its connections back."""
    backend = await start(server.dsn, driver=driver, is_borrowed=is_borrowed)
    account = await under_load(backend, lambda: FAULTS[fault](server))
    await account.assert_nothing_lost(server.dsn)
    # It takes a second at the most; the others are for a busy machine.
    assert account.seconds_to_recover < 10


async def test_startup_waits_for_a_server_that_starts(
    server: Server, driver: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    async def has_failed() -> bool:
        return "retrying for up to 30 s" in caplog.text

    await asyncio.to_thread(server.stop)
    starting = asyncio.create_task(start(server.dsn, driver=driver, run_migrations=True))
    await eventually(has_failed)
    await asyncio.to_thread(server.start)
    backend = await starting
    assert await backend.is_result_ready("task") is False
