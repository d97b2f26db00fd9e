"""Writers that are in each other's way."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.faults.conftest import Start
from tests.faults.servers import Server, ask
from tests.tasks import progress_of, result_of

HOT = ["a", "b", "c"]


@pytest.fixture
async def serializable(server: Server) -> AsyncIterator[Server]:
    setting = "default_transaction_isolation"
    await ask(server.dsn, f"ALTER DATABASE postgres SET {setting} = serializable")
    yield server
    await ask(server.dsn, f"ALTER DATABASE postgres RESET {setting}")


async def test_serializable_isolation_costs_no_write(
    serializable: Server, driver: str, start: Start
) -> None:
    writers = [await start(serializable.dsn, driver=driver) for _ in range(3)]
    numbers = iter(range(60_000))

    # Few at once of each writer, which would else put them all into one statement.
    async def overwrite(writer: Any) -> None:
        for number in numbers:
            await writer.set_result(HOT[number % 3], result_of(number))
            await writer.set_progress(HOT[number % 3], progress_of(number))
            if number >= 600 and any(writer.stats().retries for writer in writers):
                return

    await asyncio.gather(*[overwrite(writer) for writer in writers for _ in range(4)])
    assert sum(writer.stats().retries for writer in writers) > 0
    assert await asyncio.gather(*map(writers[0].is_result_ready, HOT)) == [True] * 3
