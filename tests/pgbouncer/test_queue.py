"""The queue, the workers and the dashboard behind a PgBouncer, of which they were told nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from taskiq_sa_pg import (
    Models,
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    StorageError,
    TaskAbandonedError,
    TaskMetadataMiddleware,
    TaskStatus,
    build_models,
)
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.timings import Timings
from taskiq_sa_pg.ui import dashboard
from tests.conftest import Database, eventually, shut_down
from tests.endpoints.served import follow, make_app, served
from tests.integration.brokers import SOON, send, working
from tests.integration.engines import make
from tests.integration.schedulers import NOON, Schedulers, look_at_once, schedule
from tests.integration.test_beats import worker_of
from tests.integration.waiters import counted_fetches
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

OFTEN = Timings(between_beats=0.05, between_unheard_polls=0.05, first_reconnect=0.01)


@lru_cache
def models_of() -> Models:
    return build_models(queue=True)


@dataclass
class Place:
    """The tables behind a pooler, and how they are reached."""

    database: Database
    driver: str
    is_heard: bool
    stack: AsyncExitStack

    @property
    def arguments(self) -> dict[str, Any]:
        listen = {"listen_dsn": self.database.direct_dsn} if self.is_heard else {}
        dsn = self.database.dsn_of(self.driver)
        return {"dsn": dsn, "models": models_of(), "check_schema": "off", **listen}

    async def backend(self, **options: Any) -> Backend:
        """Started, on connections of its own; at the end none of them is in use."""
        backend: Backend = SQLAlchemyResultBackend(**{**self.arguments, **options})
        backend.settings = replace(backend.settings, timings=OFTEN)
        await backend.startup()
        self.stack.push_async_callback(shut_down, [backend])
        return backend

    async def broker(self, **options: Any) -> SQLAlchemyBroker:
        """Started, as in a worker's process, with results, metadata and a task `add`."""
        broker = SQLAlchemyBroker(**{**self.arguments, **options})
        broker.settings = replace(broker.settings, timings=OFTEN)
        backend: Backend = SQLAlchemyResultBackend(**self.arguments, track="started")
        backend.settings = replace(backend.settings, timings=OFTEN)
        broker = broker.with_result_backend(backend)
        broker.add_middlewares(TaskMetadataMiddleware(record_args=True, worker="us"))
        broker.register_task(add, task_name="add")
        broker.is_worker_process = True
        await broker.startup()
        self.stack.push_async_callback(broker.shutdown)
        return broker


async def add(one: int, two: int) -> int:
    return one + two


PLACES = [
    ("asyncpg", "transaction", True),
    ("asyncpg", "transaction", False),
    ("psycopg", "transaction", True),
    ("psycopg", "transaction", False),
    ("asyncpg", "session", False),
    ("psycopg", "session", True),
    ("asyncpg", "carried", False),
    ("psycopg", "carried", True),
]


@pytest.fixture(
    params=PLACES, ids=[f"{d}-{mode}-{'heard' if h else 'unheard'}" for d, mode, h in PLACES]
)
async def place(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[Place]:
    driver, mode, is_heard = request.param
    name = {"transaction": "old_pooler", "session": "session_pooler", "carried": "new_pooler"}[mode]
    pooler = request.getfixturevalue(name)
    if mode == "carried":
        if not pooler.carries:
            pytest.skip(
                "this PgBouncer carries no prepared statements: 1.21 is the first that does"
            )
        pooler = pooler.preparing()
    engine = make_engine(database.direct_dsn)
    async with engine.begin() as connection:
        await connection.run_sync(models_of().metadata.create_all)
    await engine.dispose()
    async with AsyncExitStack() as stack:
        yield Place(replace(database, pooler=pooler), driver, is_heard, stack)


async def test_tasks_are_sent_executed_found_and_sent_again(place: Place) -> None:
    broker = await place.broker()
    backend: Any = broker.result_backend
    task = broker.find_task("add")
    assert task is not None
    async with working(broker):
        for _ in range(8):  # often enough that a driver would prepare its statements
            sent = await asyncio.gather(*[task.kiq(i, 1) for i in range(5)])
            results = await asyncio.gather(*[each.wait_result(timeout=SOON) for each in sent])
            assert [result.return_value for result in results] == [1, 2, 3, 4, 5]
        again = await backend.resend(broker, sent[0].task_id)
        assert (await again.wait_result(timeout=SOON)).return_value == 1
    page = await backend.find(name="add", argument=0, limit=100)
    assert len(page.records) == 9
    assert page.records[0].labels["rerun_of"] == sent[0].task_id
    details = await backend.get_details(sent[0].task_id, with_result=True)
    assert (details.args, details.result.return_value, details.record.worker) == ([0, 1], 1, "us")
    [worker] = await backend.get_workers()
    assert (worker.worker, worker.is_alive, worker.running) == ("us", True, 0)
    assert await backend.get_running() == []
    assert await broker.get_queues() == []


async def test_what_takes_long_is_renewed_and_parked_tasks_are_released(place: Place) -> None:
    broker = await place.broker(lease=1.8)
    is_done = asyncio.Event()

    @broker.task(task_name="long")
    async def long() -> None:
        await is_done.wait()

    parked = [await send(broker, name="parked") for _ in range(2)]
    await place.database.fetch(
        "UPDATE taskiq_results_queue SET available_at = 'infinity', deliveries = 6"
    )
    with counted_fetches() as purposes:
        async with working(broker):
            await send(broker, "long", name="long")

            async def is_renewed() -> bool:
                return sum(each.startswith("renew the leases") for each in purposes) > 1

            await eventually(is_renewed)
            counts = await broker.get_queues()
            assert [(c.task_name, c.running, c.parked) for c in counts] == [
                ("long", 1, 0),
                ("parked", 0, 2),
            ]
            is_done.set()
    assert {each.task_id for each in await broker.get_parked()} == set(parked)
    assert await broker.release_parked(parked[:1]) == 1
    assert await broker.discard_parked(parked) == 1


async def test_a_task_is_sent_with_the_transaction_of_a_session(place: Place) -> None:
    broker = await place.broker()
    task = broker.find_task("add")
    assert task is not None
    engine = make(place.database.dsn_of(place.driver))
    async with working(broker):
        for _ in range(3):
            async with AsyncSession(engine) as session:
                lost = await broker.in_session(session).kiq(task, 1, 1)
                await session.rollback()
                sent = await broker.in_session(session).kiq(task, 1, 2)
                await session.commit()
            assert (await sent.wait_result(timeout=SOON)).return_value == 3
            assert not await lost.is_ready()
    await engine.dispose()


async def test_a_schedule_is_sent_once_by_two_schedulers(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {name: value for name, value in place.arguments.items() if name != "check_schema"}
    schedulers = Schedulers(place.database, place.driver, monkeypatch)
    each = [await schedulers.start(**arguments) for _ in range(2)]
    place.stack.push_async_callback(schedulers.stop)
    for number in range(8):
        await each[0].source.add_schedule(schedule(str(number), interval=3600))
    await look_at_once(each, NOON)
    assert len(await schedulers.sent()) == 8
    assert len(await each[0].broker.get_schedules()) == 8
    for number in range(8):
        await each[1].source.delete_schedule(str(number))
    assert await each[0].source.get_schedules() == []


async def test_who_waits_for_a_lost_task_is_told(place: Place) -> None:
    backend = await place.backend(track="started")
    broker = worker_of(backend, worker="us", abandon_lost=True)
    await broker.startup()
    for _ in range(3):
        lost = new_id()
        await backend.set_status(TaskStatus(lost, "started", "task", worker="gone"))
        await place.database.fetch(
            "UPDATE taskiq_results_status SET updated_at = now() - interval '61 s'"
        )
        result = await backend.wait_result(lost, timeout=SOON)
        assert isinstance(result.error, TaskAbandonedError)
    assert [each.worker for each in await backend.get_workers()] == ["us"]
    await broker.shutdown()
    assert await place.database.fetch("SELECT FROM taskiq_results_workers") == []


async def test_a_search_leaves_no_time_limit_behind(place: Place) -> None:
    """Its own ends with its transaction: the server's session is the next client's."""
    backend = await place.backend(command_timeout=0.9)
    await backend.set_result(new_id(), result_of(1))
    slow = sa.func.pg_sleep(2).cast(sa.Text) == ""
    for conditions in ((), (slow,), ()):
        if not conditions:
            await asyncio.gather(*[backend.find() for _ in range(4)])
            continue
        with pytest.raises(StorageError, match=r"canceled, .* after 0\.3 s"):
            await backend.find(conditions)
    for _ in range(2):
        dsn = place.database.dsn.replace("&statement_cache_size=100", "")
        client = await asyncpg.connect(dsn, statement_cache_size=0)
        place.stack.push_async_callback(client.close)
        await client.execute("BEGIN")  # held, so that each has a server of its own
        assert await client.fetchval("SHOW statement_timeout") == "0"


@asynccontextmanager
async def served_dashboard(backend: Backend, broker: SQLAlchemyBroker) -> AsyncIterator[Any]:
    async with served(dashboard(backend, broker=broker, authorize=lambda _: "write")) as client:
        yield client


async def test_pages_and_streams_of_events(place: Place) -> None:
    broker = await place.broker()
    backend: Any = broker.result_backend
    finished, running = new_id(), new_id()
    await backend.set_result(finished, result_of(1))
    await backend.set_status(TaskStatus(running, "started", "task", worker="us"))
    async with served_dashboard(backend, broker) as client:
        for page in ("", "tasks", f"task?id={finished}", f"task?id={running}", "workers", "queues"):
            answers = await asyncio.gather(*[client.get(f"/{page}") for _ in range(4)])
            assert {answer.status_code for answer in answers} == {200}, page
        for page in ("parked", "schedules", "healthz"):
            assert (await client.get(f"/{page}")).status_code == 200, page
        async with client.stream("GET", f"/follow?id={running}") as response:
            lines = response.aiter_lines()
            await backend.set_progress(running, progress_of(1))
            async with asyncio.timeout(SOON):
                while await anext(lines) != "event: refresh":
                    pass
                await backend.set_result(running, result_of(2))
                while await anext(lines) != "event: end":
                    pass


async def test_endpoints_and_their_events(place: Place) -> None:
    backend = await place.backend(track="started")
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    async with served(make_app(backend)) as client:
        following = asyncio.create_task(follow(client, task_id))

        async def is_followed() -> bool:
            return backend.runtime.waiters.waiting > 0

        await eventually(is_followed)
        await backend.set_result(task_id, result_of(7))
        async with asyncio.timeout(SOON):
            events = await following
        assert [name for name, _ in events][-1] == "result"
        assert (await client.get(f"/tasks/{task_id}")).json()["value"] == 7
