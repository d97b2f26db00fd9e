"""The connections that a process opens, as docs/how-to/many-results.md counts them."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
from sqlalchemy import QueuePool

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend
from tests.conftest import engine_of, eventually
from tests.integration.brokers import Brokers, hungry, models_of, until_healthy
from tests.tasks import new_id, progress_of, result_of

PAGE: Final = Path(__file__).parents[2] / "docs/how-to/many-results.md"
FIGURES: Final = re.compile(r"^\| [\d,]+ (?:\| [\d,]+ ){4}\|$", re.MULTILINE)
# What the guide adds for everything else.
ROOM: Final = 20
PROCESSES: Final = 4


def counted() -> dict[int, tuple[int, ...]]:
    """The rows of the guide's table, by the number of processes."""
    rows = [
        [int(cell.replace(",", "")) for cell in row.strip("| ").split("|")]
        for row in FIGURES.findall(PAGE.read_text("utf-8"))
    ]
    return {row[0]: tuple(row[1:]) for row in rows}


def test_the_guide_multiplies_and_adds() -> None:
    rows = counted()
    assert list(rows) == [1, 4, 16, 100]
    by_default, small = rows[1][0], rows[1][2]
    for processes, figures in rows.items():
        most, fewest = processes * by_default, processes * small
        assert figures == (most, 2 * most + ROOM, fewest, 2 * fewest + ROOM)


@pytest.mark.parametrize(("pool", "column"), [({}, 0), ({"pool_size": 2}, 2)], ids=["5", "2"])
async def test_busy_processes_open_as_many_connections_as_the_guide_counts(
    pool: dict[str, Any], column: int, brokers: Brokers
) -> None:
    """Workers that wait for results, too, whose broker shares the backend's connections."""
    async with AsyncExitStack() as stack:
        workers = [await start(brokers, pool) for _ in range(PROCESSES)]
        for broker, backend in workers:
            _ = await stack.enter_async_context(hungry(broker))
            await stack.enter_async_context(waiting(backend))
            await until_healthy(broker)
        async with locked(brokers):
            calls = [asyncio.create_task(work(backend)) for _, backend in workers]
            for _, backend in workers:
                engine = engine_of(backend)
                assert isinstance(engine.pool, QueuePool)
                await until_full(engine.pool)
                # One that goes back overlaps with its successor, so the pool may be used up.
                for _ in range(engine.pool.size() - engine.pool.checkedout()):
                    _ = await stack.enter_async_context(engine.connect())
                assert engine.pool.checkedout() == engine.pool.size()
                assert vars(engine.pool)["_max_overflow"] == 0
            assert await brokers.sessions() == counted()[PROCESSES][column]
        await asyncio.gather(*calls)


async def start(
    brokers: Brokers, pool: dict[str, Any]
) -> tuple[SQLAlchemyBroker, SQLAlchemyResultBackend[Any]]:
    place: dict[str, Any] = {"dsn": brokers.dsn(), "models": models_of(), "check_schema": "off"}
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(**place, **pool)
    return await brokers.start(results=backend), backend


async def work(backend: SQLAlchemyResultBackend[Any]) -> None:
    """More statements at once than may be in flight."""
    ids = [new_id() for _ in range(50)]
    stored = [backend.set_result(each, result_of(1)) for each in ids]
    reported = [backend.set_progress(each, progress_of(1)) for each in ids]
    looked = [backend.is_result_ready(each) for each in ids]
    await asyncio.gather(*stored, *reported, *looked)


async def until_full(pool: QueuePool) -> None:
    """Until a backend has all the connections that it uses at once."""

    async def is_full() -> bool:
        return pool.checkedout() == min(4, pool.size())

    await eventually(is_full)


@asynccontextmanager
async def waiting(backend: SQLAlchemyResultBackend[Any]) -> AsyncIterator[None]:
    waiter = asyncio.create_task(backend.wait_result(new_id()))
    try:
        yield
    finally:
        waiter.cancel()
        await asyncio.wait([waiter])


@asynccontextmanager
async def locked(brokers: Brokers) -> AsyncIterator[None]:
    """Nobody is answered about results or progress."""
    connection = await asyncpg.connect(brokers.database.direct_dsn)
    config = models_of().config
    try:
        async with connection.transaction():
            await connection.execute(
                f'LOCK TABLE "{config.table_name}", "{config.progress_table_name}"'
            )
            yield
    finally:
        await connection.close()
