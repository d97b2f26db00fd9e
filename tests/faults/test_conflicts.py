"""Writers that are in each other's way."""

import asyncio
from typing import Any

from tests.faults.conftest import Start
from tests.faults.servers import Server, ask
from tests.tasks import progress_of, result_of

HOT = ["a", "b", "c"]


async def test_serializable_isolation_costs_no_write(
    server: Server, driver: str, start: Start
) -> None:
    await ask(
        server.dsn, "ALTER DATABASE postgres SET default_transaction_isolation = serializable"
    )
    try:
        writers = [await start(server.dsn, driver=driver) for _ in range(4)]

        numbers = iter(range(1500))

        # Few at once of each writer, which would else put them all into one statement.
        async def overwrite(writer: Any) -> None:
            for number in numbers:
                await writer.set_result(HOT[number % 3], result_of(number))
                await writer.set_progress(HOT[number % 3], progress_of(number))

        await asyncio.gather(*[overwrite(writer) for writer in writers for _ in range(5)])
        assert await asyncio.gather(*map(writers[0].is_result_ready, HOT)) == [True] * 3
    finally:
        await ask(server.dsn, "ALTER DATABASE postgres RESET default_transaction_isolation")
