"""A results table in partitions: what the backend does with it, and what partitions wait for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import asyncpg
import pytest

from taskiq_sa_pg import (
    Pruned,
    ResultIsMissingError,
    SchemaError,
    TableConfig,
    make_task_id,
)
from taskiq_sa_pg.database import Database as Connected
from taskiq_sa_pg.schema import Partition, drop_partition, find_partitions, make_partition
from taskiq_sa_pg.schema.partitions import statements_to_partition
from taskiq_sa_pg.timings import Timings
from tests.conftest import BackendFactory, Database, eventually
from tests.tasks import new_id, progress_of, result_of

CONFIG = TableConfig()
DAY = timedelta(days=1)
IMPATIENT = Timings(lock=0.05)


async def partition(database: Database) -> None:
    connection = await asyncpg.connect(database.direct_dsn)
    try:
        await connection.execute(";".join(statements_to_partition(CONFIG)))
    finally:
        await connection.close()


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Connected]:
    database = Connected(dsn, retry_timeout=0)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


async def make_partitions(dsn: str, most_moved: int = 0) -> list[Partition]:
    """Those that were made."""
    async with connected(dsn) as database:
        missing = (await find_partitions(database, CONFIG)).missing(2 * DAY, DAY)
        return [
            each
            for each in missing
            if await make_partition(database, CONFIG, each, most_moved) is not None
        ]


@pytest.fixture
async def partitioned(database: Database, start_backend: BackendFactory) -> Database:
    await start_backend()
    await partition(database)
    return database


async def test_the_operations_of_a_backend(
    dsn: str, partitioned: Database, start_backend: BackendFactory
) -> None:
    assert len(await make_partitions(dsn)) >= 3
    backend = await start_backend(dsn, run_migrations=False, track="started", result_ttl=60)
    # One in the default partition, one in that of now and one in a later one.
    later = f"{int(make_task_id()[:12], 16) + DAY // timedelta(milliseconds=1):012x}"
    ids = [new_id(), make_task_id(), later + make_task_id()[12:]]
    waiting = asyncio.create_task(backend.wait_results(ids, timeout=30))
    await asyncio.gather(*[backend.set_progress(i, progress_of(i)) for i in ids])
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in ids])
    assert [result.return_value for result in await waiting] == ids
    [[places]] = await partitioned.fetch("SELECT count(DISTINCT tableoid) FROM taskiq_results")
    assert places == 3
    # Again, in one statement, by its key.
    await asyncio.gather(*[backend.set_result(i, result_of(i.upper())) for i in ids])
    for i in ids:
        assert await backend.is_result_ready(i)
        assert (await backend.get_result(i)).return_value == i.upper()
        assert (await backend.get_progress(i)).meta == i
        assert (await backend.get_status(i)).state == "succeeded"
    assert {record.task_id for record in (await backend.find()).records} == {*ids}
    assert (await backend.get_details(ids[2])).record.task_id == ids[2]
    await partitioned.fetch(
        "UPDATE taskiq_results SET expires_at = now() - interval '1 s' WHERE task_id = $1", ids[1]
    )
    assert await backend.prune() == Pruned(1, 0, 0, is_complete=True)
    assert await backend.forget([ids[0]]) == 1
    reader = await start_backend(dsn, run_migrations=False, keep_results=False)
    assert (await reader.get_result(ids[2])).return_value == ids[2].upper()
    for i in ids:
        assert not await backend.is_result_ready(i)
        with pytest.raises(ResultIsMissingError):
            await backend.get_result(i)
    assert await partitioned.fetch("SELECT FROM taskiq_results_progress") == []


async def test_partitions_take_over_an_identity_column(
    database: Database, start_backend: BackendFactory
) -> None:
    """It comes with ATTACH, and a partition that has one already is refused."""
    [row] = await database.fetch("SELECT current_setting('server_version_num')::int AS version")
    if row["version"] < 170_000:
        pytest.skip("partitioned tables have identity columns from PostgreSQL 17 on")
    backend = await start_backend()
    await database.fetch(
        "ALTER TABLE taskiq_results ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY"
    )
    moved, later = make_task_id(), make_task_id()
    await backend.set_result(moved, result_of(1))
    for statement in statements_to_partition(CONFIG)[1:-1]:
        if "ATTACH" in statement:
            await database.fetch(
                "ALTER TABLE taskiq_results_default ALTER COLUMN number DROP IDENTITY"
            )
        await database.fetch(statement)
    assert await make_partitions(database.dsn, most_moved=1)
    await database.fetch("SELECT setval(pg_get_serial_sequence('taskiq_results', 'number'), 6)")
    await backend.set_result(later, result_of(2))
    rows = await database.fetch("SELECT number FROM taskiq_results ORDER BY number")
    assert [row["number"] for row in rows] == [1, 7]


async def test_dropped_results_leave_progress_to_prune(
    dsn: str, partitioned: Database, start_backend: BackendFactory
) -> None:
    [made, *_] = await make_partitions(dsn)
    backend = await start_backend(dsn, run_migrations=False, progress_ttl=0.001)
    task_id = make_task_id()
    await backend.set_progress(task_id, progress_of(1))
    await backend.set_result(task_id, result_of(1))
    async with connected(dsn) as database:
        assert await drop_partition(database, CONFIG, made)
        assert not await drop_partition(database, CONFIG, made)
    assert not await backend.is_result_ready(task_id)
    assert (await backend.get_progress(task_id)).meta == 1
    assert (await backend.prune()).progress == 1
    # It is late, and has a place all the same.
    await backend.set_result(task_id, result_of(2))
    assert (await backend.get_result(task_id)).return_value == 2


async def test_any_number_may_make_and_drop_them_at_once(
    dsn: str, partitioned: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(dsn, run_migrations=False)
    task_id = make_task_id()
    await backend.set_result(task_id, result_of(1))
    made = await asyncio.gather(*[make_partitions(dsn, most_moved=1) for _ in range(4)])
    partitions = [*chain(*made)]
    assert len(partitions) == len({*partitions}) >= 3
    assert (await backend.get_result(task_id)).return_value == 1
    async with connected(dsn) as database:
        for each in partitions:
            drops = [drop_partition(database, CONFIG, each) for _ in range(3)]
            assert sorted(await asyncio.gather(*drops)) == [False, False, True]


async def test_finding_them_deadlocks_with_nobody_who_makes_one(
    dsn: str, partitioned: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no lock on a partition when it locks the table, to see how its ids are sorted."""
    locked = []

    async def sort(*_: Any) -> bool:
        async with transaction(partitioned) as maker:
            for table in ("ONLY taskiq_results", CONFIG.partition_name("default")):
                await maker.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE NOWAIT")
                locked.append(table)
        return True

    monkeypatch.setattr("taskiq_sa_pg.schema.partitions.sorts_hex", sort)
    async with connected(dsn) as database:
        assert (await find_partitions(database, CONFIG)).partitions == ()
    assert len(locked) == 2


async def until_waiting(database: Database, sessions: int) -> None:
    """So many sessions wait for a lock on a table of the schema."""

    async def is_so() -> bool:
        query = (
            "SELECT count(DISTINCT pid) FROM pg_locks JOIN pg_class c ON c.oid = relation "
            "WHERE NOT granted AND relnamespace = $1::text::regnamespace"
        )
        [[count]] = await database.fetch(query, database.schema)
        return bool(count == sessions)

    await eventually(is_so)


async def test_nobody_misses_results_that_are_moved(
    dsn: str, partitioned: Database, start_backend: BackendFactory
) -> None:
    """Who waits meanwhile finds them and stores others, where they are afterwards."""
    backend = await start_backend(dsn, run_migrations=False)
    moved, new = make_task_id(), make_task_id()
    await backend.set_result(moved, result_of(1))

    async with connected(dsn) as database, asyncio.TaskGroup() as tasks:
        [now, *_] = (await find_partitions(database, CONFIG)).missing(DAY, DAY)
        async with reading(partitioned):
            making = tasks.create_task(make_partition(database, CONFIG, now, 1))
            await until_waiting(partitioned, 1)
            getting = tasks.create_task(backend.get_result(moved))
            storing = tasks.create_task(backend.set_result(new, result_of(2)))
            await until_waiting(partitioned, 3)
        assert await making == 1
        assert (await getting).return_value == 1
        await storing
    for task_id in (moved, new):
        rows = await partitioned.fetch(f"SELECT FROM {now.name} WHERE task_id = $1", task_id)
        assert len(rows) == 1


@asynccontextmanager
async def reading(database: Database) -> AsyncIterator[None]:
    """A transaction that has read the table, and goes on."""
    async with transaction(database) as connection:
        await connection.execute("SELECT FROM taskiq_results")
        yield


@asynccontextmanager
async def transaction(database: Database) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(database.direct_dsn)
    try:
        async with connection.transaction():
            yield connection
    finally:
        await connection.close()


async def test_whoever_reads_for_long_is_not_waited_for_for_long(
    dsn: str, partitioned: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(dsn, run_migrations=False)
    async with connected(dsn) as database:
        found = await find_partitions(database, CONFIG)
        [made, missing, *_] = found.missing(2 * DAY, DAY)
        assert await make_partition(database, CONFIG, made, 0) == 0
        async with reading(partitioned):
            with pytest.raises(SchemaError, match=r"wait until they end .* and run it again"):
                await drop_partition(database, CONFIG, made, IMPATIENT)
            with pytest.raises(SchemaError, match=r"wait until they end .* and run it again"):
                await make_partition(database, CONFIG, missing, 0, IMPATIENT)
            await backend.set_result(make_task_id(), result_of(1))
        assert (await find_partitions(database, CONFIG)).partitions == (made,)
        await partitioned.fetch("DROP TABLE taskiq_results_default")
        # Without a default partition there is nobody to wait for.
        async with reading(partitioned):
            assert await make_partition(database, CONFIG, missing, 0, IMPATIENT) == 0
