"""Servers that restart, crash, are killed, close connections, have none left, or are locked."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import asyncpg
import pytest

from tests.conftest import eventually
from tests.faults.conftest import Start
from tests.faults.load import under_load
from tests.faults.servers import Server, ask

TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


async def restart(server: Server, how: signal.Signals) -> None:
    await asyncio.to_thread(server.stop, how)
    await asyncio.to_thread(server.start)


async def terminate_for_a_while(server: Server) -> None:
    for _ in range(25):
        await ask(server.dsn, TERMINATE)
        await asyncio.sleep(0.2)


async def take_all_connections(server: Server) -> None:
    """Takes those that are left, closes all others, and for 5 s takes what comes free."""
    held: list[asyncpg.Connection] = []
    try:
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await _connect_for_ever(server, held)
        ours = [connection.get_server_pid() for connection in held]
        await held[0].execute(f"{TERMINATE} AND pid <> ALL ($1)", ours)
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                while True:
                    with suppress(asyncpg.PostgresError):
                        held.append(await asyncpg.connect(server.dsn))
                    await asyncio.sleep(0.05)
    finally:
        for connection in held:
            connection.terminate()


async def _connect_for_ever(server: Server, connections: list[asyncpg.Connection]) -> None:
    while True:
        connections.append(await asyncpg.connect(server.dsn))


async def lock_the_table(server: Server) -> None:
    await ask(server.dsn, "DO $$ BEGIN LOCK TABLE taskiq_results; PERFORM pg_sleep(5); END $$")


FAULTS: dict[str, Callable[[Server], Awaitable[None]]] = {
    "fast restart": lambda server: restart(server, signal.SIGINT),
    "crash": lambda server: restart(server, signal.SIGQUIT),
    "kill -9": lambda server: restart(server, signal.SIGKILL),
    "terminated connections": terminate_for_a_while,
    "no connections left": take_all_connections,
    "locked table": lock_the_table,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_result_is_lost_and_no_waiter_fails(
    fault: str, server: Server, driver: str, start: Start
) -> None:
    backend = await start(server.dsn, driver=driver)
    account = await under_load(backend, lambda: FAULTS[fault](server))
    await account.assert_nothing_lost(server.dsn)
    # It takes a second at the most; the others are for a busy machine.
    assert account.seconds_to_recover < 10


@pytest.mark.parametrize("fault", ["crash", "terminated connections"])
async def test_a_borrowed_engine_serves_its_owner_afterwards(
    fault: str, server: Server, driver: str, start: Start
) -> None:
    backend = await start(server.dsn, driver=driver, is_borrowed=True)
    account = await under_load(backend, lambda: FAULTS[fault](server))
    await account.assert_nothing_lost(server.dsn)


async def test_startup_waits_for_a_server_that_starts(
    server: Server, driver: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    async def has_failed() -> bool:
        return "trying again for up to 30 s" in caplog.text

    await asyncio.to_thread(server.stop)
    starting = asyncio.create_task(start(server.dsn, driver=driver))
    await eventually(has_failed)
    await asyncio.to_thread(server.start)
    backend = await starting
    assert await backend.is_result_ready("task") is False
