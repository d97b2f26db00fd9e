"""What goes wrong with servers and networks, for some seconds."""

import asyncio
import signal
from contextlib import suppress
from typing import Final

import asyncpg
import pytest

from tests.faults.proxy import Proxy
from tests.faults.servers import Server, ask

TERMINATE: Final = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


async def restart(server: Server, how: signal.Signals) -> None:
    await asyncio.to_thread(server.stop, how)
    await asyncio.to_thread(server.start)


async def terminate_often(server: Server, times: int = 10) -> None:
    for _ in range(times):
        await ask(server.dsn, TERMINATE)
        await asyncio.sleep(0.05)


async def take_all_connections(server: Server, seconds: float = 1.0) -> None:
    """Takes those that are left, closes all others, and for some time takes what comes free."""
    held: list[asyncpg.Connection] = []

    async def take() -> None:
        while True:
            held.append(await asyncpg.connect(server.dsn))

    async def go_on_taking() -> None:
        while True:
            with suppress(asyncpg.PostgresError):
                await take()
            await asyncio.sleep(0.02)

    try:
        with pytest.raises(asyncpg.TooManyConnectionsError):
            await take()
        ours = [connection.get_server_pid() for connection in held]
        await held[0].execute(f"{TERMINATE} AND pid <> ALL ($1)", ours)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                for _ in range(5):
                    group.create_task(go_on_taking())
    finally:
        for connection in held:
            connection.terminate()


async def lock_the_table(server: Server, seconds: float = 1.0) -> None:
    lock = "DO $$ BEGIN LOCK TABLE taskiq_results; PERFORM pg_sleep(%g); END $$"
    await ask(server.dsn, lock % seconds)


async def fall_silent(proxy: Proxy, seconds: float = 1.2) -> None:
    """Swallows; the connections of that time stay dead."""
    proxy.is_silent = True
    await asyncio.sleep(seconds)
    proxy.is_silent = False


async def cut_often(proxy: Proxy, times: int = 10) -> None:
    for _ in range(times):
        proxy.cut()
        await asyncio.sleep(0.05)


async def refuse(proxy: Proxy, seconds: float = 0.5) -> None:
    await proxy.refuse()
    await asyncio.sleep(seconds)
    await proxy.open(proxy.port)


async def slow_down(proxy: Proxy, seconds: float = 1.0) -> None:
    proxy.delay = 0.05
    await asyncio.sleep(seconds)
    proxy.delay = 0
