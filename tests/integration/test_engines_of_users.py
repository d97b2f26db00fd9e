"""What a backend does on an engine that an application has made, however it has made it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, get_args

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AssertionPool, Pool, StaticPool
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg import (
    Models,
    ResultIsMissingError,
    SQLAlchemyResultBackend,
    StorageError,
    build_models,
)
from taskiq_sa_pg.models import PayloadField
from tests.conftest import (
    Database,
    NewDatabase,
    assert_comes_to_rest,
    assert_nothing_checked_out,
)
from tests.integration.databases import Checkouts
from tests.integration.engines import SHAPES, make
from tests.integration.waiters import SOON, heard_by, until_waiting
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

REFUSED = "a task id that a constraint refuses"

# None is the task that has nothing of the kind.
VALUES: list[Any] = [None, "ünï 🙂 %s :x $1", 2**80, {"b": [1, {"z": None, "a": 0.1}], "a": "\x00"}]


@pytest.fixture(scope="module")
def tables(new_database: NewDatabase) -> Iterator[Database]:
    """A schema with tables for both kinds of payload, which the tests share."""
    database = new_database()

    async def make() -> None:
        await database.create()
        for payload in get_args(PayloadField):
            models = models_in(database, payload)
            backend = Backend(database.dsn, models=models, run_migrations=True)
            await backend.startup()
            await backend.shutdown()
            table = models.config.table_name
            await database.fetch(f"ALTER TABLE \"{table}\" ADD CHECK (task_id <> '{REFUSED}')")

    asyncio.run(make())
    yield database
    asyncio.run(database.drop())


@lru_cache
def models_in(database: Database, payload: PayloadField) -> Models:
    # Channels are called like tables, and belong to the whole database.
    name = f"100% {payload} {database.schema[-20:]}"
    return build_models(table_name=name, field_for_payload=payload)


def each_shape(first: int) -> pytest.MarkDecorator:
    """Every shape, by turns with one driver and the other; the tests begin with different ones."""
    drivers = ["asyncpg", "psycopg"]
    pairs = [(shape, drivers[(first + number) % 2]) for number, shape in enumerate(SHAPES)]
    return pytest.mark.parametrize(("shape", "driver"), pairs)


@pytest.fixture
async def application_name() -> str:
    return f"application {new_id()}"


@pytest.fixture
async def engine(
    shape: str, driver: str, tables: Database, application_name: str
) -> AsyncIterator[AsyncEngine]:
    """An application's engine; at the end nobody has a connection of it."""
    dsn = f"{tables.dsn_of(driver)}&application_name={application_name.replace(' ', '%20')}"
    engine = SHAPES[shape](dsn)
    yield engine
    assert_nothing_checked_out(engine)
    await engine.dispose()


@pytest.fixture
def arguments(shape: str, tables: Database) -> dict[str, Any]:
    """What else a backend on this engine is made with."""
    models = models_in(tables, "Jsonb" if shape.startswith("JSON") else "Bytea")
    return {"models": models, "listen_dsn": tables.direct_dsn if tables.is_deaf else None}


@pytest.fixture
async def backend(engine: AsyncEngine, arguments: dict[str, Any]) -> AsyncIterator[Backend]:
    """A backend that has looked at its tables."""
    backend = Backend(engine=engine, **arguments)
    await backend.startup()
    yield backend
    await assert_comes_to_rest(backend)
    await backend.shutdown()


@each_shape(0)
async def test_what_is_stored_and_overwritten_comes_back_whole(backend: Backend) -> None:
    task_id = new_id()
    for value in VALUES:
        labels = {"zone": "b", "at": "2026-01-02T03:04:05", "nested": {"b": [value], "a": 1}}
        await backend.set_result(task_id, result_of(value, labels=labels))
        assert await backend.is_result_ready(task_id)
        result = await backend.get_result(task_id)
        assert (result.return_value, result.labels) == (value, labels)
    failure = result_of(None, is_err=True, error=ValueError("no", datetime.now(UTC).isoformat()))
    await backend.set_result(task_id, failure)
    result = await backend.get_result(task_id)
    assert (type(result.error), result.error.args) == (ValueError, failure.error.args)  # type: ignore[union-attr]  # it is one
    assert await backend.get_progress(task_id) is None
    for value in VALUES:
        await backend.set_progress(task_id, progress_of(value))
        assert await backend.get_progress(task_id) == progress_of(value)


@each_shape(1)
async def test_many_results_are_stored_and_read_at_once(backend: Backend) -> None:
    task_ids = [new_id() for _ in range(250)]
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in task_ids])
    results = await backend.get_results([*task_ids, new_id()])
    assert {i: result.return_value for i, result in results.items()} == {i: i for i in task_ids}


@each_shape(0)
@pytest.mark.usefixtures("blind")
async def test_who_waits_for_progress_or_a_result_is_woken_by_push(backend: Backend) -> None:
    task_id = new_id()
    seen: asyncio.Queue[TaskProgress[Any]] = asyncio.Queue()

    async def follow() -> None:
        async for progress in backend.watch_progress(task_id, timeout=SOON):
            seen.put_nowait(progress)

    async with heard_by(backend):
        following = asyncio.create_task(follow())
        waiter = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
        await until_waiting(backend, 3)
        for value in VALUES:
            await backend.set_progress(task_id, progress_of(value))
            assert await asyncio.wait_for(seen.get(), SOON) == progress_of(value)
        await backend.set_result(task_id, result_of("there"))
        assert (await waiter).return_value == "there"
        await following


@each_shape(1)
async def test_a_result_kept_once_goes_to_one_of_many(
    engine: AsyncEngine, backend: Backend, arguments: dict[str, Any]
) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of("once"))
    await backend.set_progress(task_id, progress_of(1))
    once = Backend(engine=engine, keep_results=False, **arguments)
    await once.startup()
    answers = await asyncio.gather(
        *[once.get_result(task_id) for _ in range(10)], return_exceptions=True
    )
    results = [answer for answer in answers if isinstance(answer, TaskiqResult)]
    assert [result.return_value for result in results] == ["once"]
    assert sum(isinstance(answer, ResultIsMissingError) for answer in answers) == 9
    assert await backend.get_progress(task_id) is None
    await once.shutdown()


@each_shape(0)
async def test_a_row_that_is_refused_costs_its_neighbours_nothing(backend: Backend) -> None:
    task_ids = [new_id() for _ in range(50)]
    calls = [backend.set_result(i, result_of(i)) for i in (*task_ids[:20], REFUSED, *task_ids[20:])]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    [error] = [answer for answer in answers if answer is not None]
    assert isinstance(error, StorageError)
    assert error.sqlstate == "23514"
    assert "\n" not in str(error)
    assert len(await backend.get_results(task_ids)) == 50


@each_shape(1)
async def test_a_pool_is_used_lightly(
    engine: AsyncEngine,
    arguments: dict[str, Any],
    tables: Database,
    application_name: str,
    shape: str,
) -> None:
    """However much is asked for at once: two sessions, and none idle in a transaction."""
    backend = Backend(engine=engine, max_connections=2, **arguments)
    checkouts = Checkouts()
    for listener, name in checkouts.pool_events:
        sa.event.listen(engine.sync_engine, name, listener)
    await backend.startup()
    await backend.set_result("there", result_of(1))
    samples = []
    async with heard_by(backend), seen_by(tables, application_name) as sessions:
        load = asyncio.create_task(ask_for_much(backend))
        while not load.done():
            samples.append(await sessions())
        await load
        await assert_comes_to_rest(backend)
        samples.append(await sessions())
    assert len(samples) > 2
    # With the listening one. What a NullPool closes lives on at the server for a moment.
    assert max(map(len, samples)) <= 3 or shape == "NullPool"
    assert [sample for sample in samples if "idle in transaction" in sample] == []
    assert checkouts.most <= 2
    await backend.shutdown()


async def ask_for_much(backend: Backend) -> None:
    for _ in range(2):
        task_ids = [new_id() for _ in range(20)]
        waiters = [asyncio.create_task(backend.wait_result(i, timeout=60)) for i in task_ids]
        await asyncio.gather(
            *[backend.set_result(i, result_of(i)) for i in task_ids],
            *[backend.set_progress(i, progress_of(i)) for i in task_ids],
            *[backend.get_result("there") for i in task_ids],
            *[backend.is_result_ready(i) for i in task_ids],
            *[backend.get_progress(i) for i in task_ids],
            *waiters,
        )


@asynccontextmanager
async def seen_by(
    database: Database, application_name: str
) -> AsyncIterator[Callable[[], Awaitable[list[str]]]]:
    """What the server says again and again of the states of its sessions."""
    # pool_pre_ping's ";" is sent in a transaction of its own.
    query = (
        "SELECT state FROM pg_stat_activity "
        "WHERE application_name = $1 AND state IS NOT NULL AND query !~ '^(BEGIN)?;$'"
    )
    connection = await asyncpg.connect(database.direct_dsn)

    async def sessions() -> list[str]:
        return [row["state"] for row in await connection.fetch(query, application_name)]

    yield sessions
    await connection.close()


@each_shape(0)
async def test_the_next_user_of_a_connection_finds_it_as_it_always_was(
    engine: AsyncEngine, backend: Backend, arguments: dict[str, Any]
) -> None:
    """Its isolation level, its transactions and its settings."""
    before = await findings(engine)
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    assert await findings(engine) == before
    with pytest.raises(StorageError):
        await backend.set_result(REFUSED, result_of(1))
    assert await findings(engine) == before
    once = Backend(engine=engine, keep_results=False, **arguments)
    await once.startup()
    await once.get_result(task_id)
    assert await findings(engine) == before
    with pytest.raises(ResultIsMissingError):
        await once.get_result(task_id)
    await once.shutdown()
    assert await findings(engine) == before


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("poolclass", [StaticPool, AssertionPool])
async def test_a_pool_that_has_one_connection_for_everybody_is_enough(
    poolclass: type[Pool], driver: str, tables: Database
) -> None:
    """For a backend that nobody shares it with: it never uses the connection twice at once."""
    engine = make(tables.dsn_of(driver), poolclass=poolclass)
    listen_dsn = tables.direct_dsn if tables.is_deaf else None
    models = models_in(tables, "Bytea")
    backend = Backend(engine=engine, keep_results=False, listen_dsn=listen_dsn, models=models)
    await backend.startup()
    async with heard_by(backend):
        task_ids = [new_id() for _ in range(20)]
        waiters = [asyncio.create_task(backend.wait_result(i, timeout=60)) for i in task_ids]
        await asyncio.gather(
            *[backend.set_result(i, result_of(i)) for i in task_ids],
            *[backend.set_progress(i, progress_of(i)) for i in task_ids],
            *[backend.get_progress(i) for i in task_ids],
        )
        assert [result.return_value for result in await asyncio.gather(*waiters)] == task_ids
    await backend.shutdown()
    await engine.dispose()


async def findings(engine: AsyncEngine) -> dict[str, Any]:
    """What an application notices of its connections."""
    found: dict[str, Any] = {}
    async with engine.connect() as connection:
        for name in ("transaction_isolation", "transaction_read_only", "search_path", "jit"):
            found[name] = await connection.scalar(sa.select(sa.func.current_setting(name)))
        # In a transaction it is the same one.
        transactions = [
            await connection.scalar(sa.select(sa.cast(sa.func.pg_current_xact_id(), sa.Text)))
            for _ in range(2)
        ]
        found["is one transaction"] = transactions[0] == transactions[1]
        found["level"] = await connection.run_sync(lambda c: c.get_isolation_level())
    return found
