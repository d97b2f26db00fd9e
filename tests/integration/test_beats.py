"""The beat of a process: who begins it, who ends it, and that it is in nobody's way."""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import asyncpg
import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped
from taskiq import BrokerMessage, InMemoryBroker, TaskiqMessage

from taskiq_sa_pg import (
    ConfigurationError,
    Models,
    ProgressMixin,
    ResultMixin,
    SchemaError,
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    StatusMixin,
    TaskAbandonedError,
    TaskMetadataMiddleware,
    TaskStatus,
    WorkerMixin,
    build_models,
)
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.timings import Timings
from tests.conftest import BackendFactory, Database, eventually
from tests.integration.databases import Log
from tests.integration.test_workers import age_statuses, start_task, states_of, store_worker
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]

OURS = f"{socket.gethostname()}:{os.getpid()}"
OFTEN = Timings(between_beats=0.01)

WORKERS = "SELECT worker, seen_at, started_at FROM taskiq_results_workers ORDER BY worker"


@pytest.fixture
async def backend(database: Database, start_backend: BackendFactory) -> Backend:
    started: Backend = await start_backend(
        track="started", timings=OFTEN, listen_dsn=database.direct_dsn
    )
    return started


class WorkerBroker(InMemoryBroker):
    """In a worker's process, which begins and ends as taskiq's does."""

    async def startup(self) -> None:
        for middleware in self.middlewares:
            middleware.startup()
        await self.result_backend.startup()

    async def shutdown(self) -> None:
        for middleware in self.middlewares:
            await middleware.shutdown()
        await self.result_backend.shutdown()


def worker_of(backend: Backend, **options: Any) -> WorkerBroker:
    broker = WorkerBroker()
    broker.is_worker_process = True
    broker.with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(**options))
    return broker


async def names(database: Database) -> list[str]:
    return [row["worker"] for row in await database.fetch(WORKERS)]


def are_seen(database: Database, *workers: str) -> Callable[[], Awaitable[bool]]:
    async def is_so() -> bool:
        return await names(database) == list(workers)

    return is_so


async def wait_for_beat(database: Database, worker: str) -> None:
    """Until it has been seen once more."""
    seen = {row["worker"]: row["seen_at"] for row in await database.fetch(WORKERS)}

    async def has_beaten() -> bool:
        rows = await database.fetch(WORKERS)
        return any(r["worker"] == worker and r["seen_at"] > seen[worker] for r in rows)

    await eventually(has_beaten)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_worker_has_a_row_from_its_start_to_its_stop(
    driver: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(database.dsn_of(driver), track="started", timings=OFTEN)
    broker = worker_of(backend)
    await broker.startup()
    await eventually(are_seen(database, OURS))
    await wait_for_beat(database, OURS)
    [worker] = await backend.get_workers()
    assert (worker.worker, worker.is_alive, worker.running) == (OURS, True, 0)
    assert timedelta() < worker.seen_at - worker.started_at < timedelta(hours=1)
    await broker.shutdown()
    assert await names(database) == []
    await broker.startup()
    await eventually(are_seen(database, OURS))
    await broker.shutdown()
    assert await names(database) == []


async def test_a_process_that_only_sends_has_none(backend: Backend, database: Database) -> None:
    broker = worker_of(backend)
    broker.is_worker_process = False
    await broker.startup()
    await broker.middlewares[0].pre_send(message_of("1"))
    assert await names(database) == []
    await broker.shutdown()


def message_of(task_id: str) -> Any:
    return TaskiqMessage(task_id=task_id, task_name="task", labels={}, args=[], kwargs={})


async def test_where_tasks_run_in_the_process_that_sends_them_the_first_begins_it(
    backend: Backend, database: Database
) -> None:
    broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(worker="us"))

    @broker.task
    async def one() -> int:
        return 1

    assert await names(database) == []
    for _ in range(2):
        await one.kiq()
    await eventually(are_seen(database, "us"))
    await backend.shutdown()
    assert await names(database) == []


@pytest.mark.parametrize("options", [{"record_worker": False}, {"track": None}, {"Worker": None}])
async def test_no_beat_where_it_is_not_wanted(
    options: dict[str, Any], database: Database, start_backend: BackendFactory
) -> None:
    made = await start_backend()
    models = made.models if "Worker" not in options else replace(made.models, Worker=None)
    track = options.get("track", "started")
    log = Log()
    backend = await start_backend(
        models=models, track=track, timings=OFTEN, pool_events=[(log.attach, "connect")]
    )
    broker = worker_of(backend, record_worker=options.get("record_worker", True))
    await broker.startup()
    await broker.middlewares[0].pre_execute(message_of("1"))
    await backend.get_status("1")
    await broker.shutdown()
    assert log.count("taskiq_results_workers") == log.count("asked")
    assert not any('INSERT INTO "taskiq_results_workers"' in each for each in log.queries)


async def test_brokers_of_one_process_share_its_row(
    backend: Backend, database: Database, start_backend: BackendFactory
) -> None:
    """Those with one backend, and those with a backend each."""
    other = await start_backend(track="started", timings=OFTEN)
    brokers = [worker_of(backend), worker_of(backend), worker_of(other)]
    for broker in brokers:
        await broker.startup()
    await eventually(are_seen(database, OURS))
    [first] = await database.fetch(WORKERS)
    for broker in brokers[:2]:
        await broker.shutdown()
        await wait_for_beat(database, OURS)
    [last] = await database.fetch(WORKERS)
    assert last["started_at"] - first["started_at"] <= timedelta()
    await brokers[2].shutdown()
    assert await names(database) == []


async def test_the_last_of_a_process_deletes_the_row_and_none_before(
    database: Database, start_backend: BackendFactory
) -> None:
    """In whatever order they have renewed it."""
    backends = [await start_backend(track="started") for _ in range(2)]
    for order in (backends, backends[::-1]):
        brokers = [worker_of(backend) for backend in order]
        for number, broker in enumerate(brokers):
            broker.middlewares[0].startup()
            backend = order[number]
            await backend.startup()
            await eventually(are_seen(database, OURS))
        for backend in order:
            await eventually(has_been_seen(backend))
        await brokers[1].middlewares[0].shutdown()
        assert await names(database) == [OURS]
        await brokers[0].middlewares[0].shutdown()
        assert await names(database) == []
    for backend in backends * 2:
        await backend.shutdown()


def has_been_seen(backend: Backend) -> Callable[[], Awaitable[bool]]:
    """Whether the first beat of a backend has been answered."""

    async def is_so() -> bool:
        return backend.runtime.workers.is_seen

    return is_so


async def test_a_row_that_another_process_has_renewed_stays(
    database: Database, start_backend: BackendFactory
) -> None:
    broker = worker_of(await start_backend(track="started"), worker="us")
    await broker.startup()
    await eventually(are_seen(database, "us"))
    await eventually(has_been_seen(broker.result_backend))
    await store_worker(database, "us")
    await broker.shutdown()
    assert await names(database) == ["us"]


async def test_brokers_that_come_and_go_leave_nothing_behind(backend: Backend) -> None:
    """The connections keep each statement that they are given for as long as the backend runs."""
    await backend.startup()
    fetched: WeakSet[Any] = WeakSet()
    fetch = backend.database.fetch

    async def noted(statement: Any, *args: Any, **options: Any) -> Any:
        fetched.add(statement)
        return await fetch(statement, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.database, "fetch", noted)
        for _ in range(3):
            broker = worker_of(backend)
            await broker.startup()
            await eventually(has_been_seen(backend))
            await broker.shutdown()
    assert len(fetched) == 2


async def test_processes_that_share_a_name_leave_the_row_to_each_other(
    backend: Backend, database: Database
) -> None:
    await store_worker(database, "us", started=100)
    broker = worker_of(backend, worker="us")
    await broker.startup()
    await wait_for_beat(database, "us")
    [row] = await database.fetch(WORKERS)
    assert row["seen_at"] - row["started_at"] > timedelta(seconds=100)
    await broker.shutdown()
    assert await names(database) == ["us"]


async def test_a_process_takes_over_the_row_of_one_that_is_gone(
    backend: Backend, database: Database
) -> None:
    await store_worker(database, "us", seen=61, started=100_000)
    task_id = await start_task(backend, "us")
    await age_statuses(database, 90_000)
    broker = worker_of(backend, worker="us")
    await broker.startup()
    await wait_for_beat(database, "us")
    [row] = await database.fetch(WORKERS)
    assert row["seen_at"] - row["started_at"] < timedelta(hours=1)
    assert await states_of(backend, task_id) == {"lost"}
    await broker.shutdown()
    assert await names(database) == []


async def test_a_container_that_starts_again_at_once_takes_over_its_row(
    backend: Backend, database: Database
) -> None:
    """With the same host name and process id, and no other process can have them."""
    await store_worker(database, OURS, started=100_000)
    task_id = await start_task(backend, OURS)
    await age_statuses(database, 90_000)
    assert await states_of(backend, task_id) == {"started"}
    broker = worker_of(backend)
    await broker.startup()
    await wait_for_beat(database, OURS)
    assert await states_of(backend, task_id) == {"lost"}
    await broker.shutdown()
    assert await names(database) == []


async def test_rows_of_yesterday_are_swept(backend: Backend, database: Database) -> None:
    await store_worker(database, "yesterday", seen=86_401)
    await store_worker(database, "today", seen=86_000)
    broker = worker_of(backend, worker="us")
    await broker.startup()
    await eventually(are_seen(database, "today", "us"))
    await broker.shutdown()
    assert await names(database) == ["today"]


async def test_a_beat_that_fails_is_told_once_and_goes_on(
    backend: Backend, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    broker = worker_of(backend, worker="us")
    await broker.startup()
    await eventually(are_seen(database, "us"))
    await database.fetch("ALTER TABLE taskiq_results_workers RENAME TO away")

    async def has_failed() -> bool:
        return len(caplog.messages) > 0

    for _ in range(2):
        await eventually(has_failed)
        for _ in range(5):  # meanwhile it fails again
            await database.fetch("SELECT FROM away")
        [told] = caplog.messages
        assert told.startswith("a heartbeat of worker us failed: ")
        await database.fetch("ALTER TABLE away RENAME TO taskiq_results_workers")
        await wait_for_beat(database, "us")
        caplog.clear()
        await database.fetch("ALTER TABLE taskiq_results_workers RENAME TO away")
    await database.fetch("ALTER TABLE away RENAME TO taskiq_results_workers")
    await broker.shutdown()


async def test_a_database_that_is_away_delays_no_stop(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(track="started", timings=Timings(end_of_beat=0.2))
    broker = worker_of(backend, worker="us")
    await broker.startup()
    await eventually(are_seen(database, "us"))
    connection = await asyncpg.connect(database.direct_dsn)
    try:
        await connection.execute("BEGIN; LOCK TABLE taskiq_results_workers")
        started_at = time.monotonic()
        await broker.middlewares[0].shutdown()
        assert 0.1 < time.monotonic() - started_at < 1.5
    finally:
        await connection.close()
    await backend.shutdown()
    assert await names(database) == ["us"]


async def test_a_startup_that_fails_leaves_no_beat(
    database: Database, start_backend: BackendFactory
) -> None:
    await start_backend()
    await database.fetch("ALTER TABLE taskiq_results RENAME TO away")
    backend: Backend = SQLAlchemyResultBackend(database.dsn, track="started")
    broker = worker_of(backend, worker="us")
    with pytest.raises(SchemaError, match="table taskiq_results does not exist"):
        await broker.startup()
    await broker.shutdown()
    assert await names(database) == []
    await database.fetch("ALTER TABLE away RENAME TO taskiq_results")
    await broker.startup()
    await eventually(are_seen(database, "us"))
    await broker.shutdown()
    assert await names(database) == []


def test_another_event_loop_has_a_beat_of_its_own(new_database: Any) -> None:
    """And one that ended without shutdown() has kept nothing alive."""
    database: Database = new_database()
    backend: Backend = SQLAlchemyResultBackend(database.dsn, track="started", run_migrations=True)
    broker = worker_of(backend, worker="us")

    async def make() -> None:
        await database.create()
        await broker.startup()
        await eventually(are_seen(database, "us"))

    async def again() -> None:
        await store_worker(database, "us", seen=61)
        await broker.startup()

        async def is_alive() -> bool:
            return [each.is_alive for each in await backend.get_workers()] == [True]

        await eventually(is_alive)
        await broker.shutdown()
        assert await names(database) == []
        await database.drop()

    asyncio.run(make())
    asyncio.run(again())


async def test_a_worker_s_name_that_no_key_can_hold_is_refused() -> None:
    for name, flaw in (("", "worker is empty"), ("x" * 3000, "worker is longer than the 2692")):
        with pytest.raises(ConfigurationError, match=flaw):
            TaskMetadataMiddleware(worker=name)


@pytest.fixture
async def abandoning(backend: Backend) -> Any:
    """A worker that gives up lost tasks."""
    broker = worker_of(backend, worker="us", abandon_lost=True)
    await broker.startup()
    yield broker
    await broker.shutdown()


@pytest.mark.usefixtures("blind")
async def test_who_waits_for_a_lost_task_is_told(
    backend: Backend, database: Database, abandoning: WorkerBroker
) -> None:
    lost, alive = await start_task(backend, "gone"), await start_task(backend, "us")
    waiting = asyncio.create_task(backend.wait_result(lost, timeout=30))
    await wait_for_beat(database, "us")
    assert not waiting.done()
    await age_statuses(database, 61, "gone")
    result = await waiting
    assert isinstance(result.error, TaskAbandonedError)
    assert str(result.error).startswith(f"task {lost!r} was lost: its worker gone was killed")
    status = await backend.get_status(lost)
    assert (status.state, status.task_name, status.worker) == ("failed", "task", "gone")
    assert await states_of(backend, alive) == {"started"}
    await backend.set_result(lost, result_of(7))
    assert (await backend.get_result(lost)).return_value == 7
    assert (await database.fetch("SELECT task_id FROM taskiq_results_status")) == [(alive,)]


async def test_a_result_that_is_there_stays(
    backend: Backend, database: Database, abandoning: WorkerBroker
) -> None:
    """That of an earlier attempt, too; the later one comes in place of the error."""
    task_id, other = new_id(), new_id()
    await backend.set_result(task_id, result_of(1))
    for each in (task_id, other):
        await backend.set_status(TaskStatus(each, "started", attempt=2, worker="gone"))
    await age_statuses(database, 3600)
    assert isinstance((await backend.wait_result(other, timeout=30)).error, TaskAbandonedError)
    await wait_for_beat(database, "us")
    assert (await backend.get_result(task_id)).return_value == 1
    assert await states_of(backend, task_id) == {"lost"}
    await backend.set_result(other, result_of(5, labels={"_retries": 1}))
    assert isinstance((await backend.get_result(other)).error, TaskAbandonedError)
    await backend.set_result(other, result_of(6, labels={"_retries": 2}))
    assert (await backend.get_result(other)).return_value == 6


async def test_a_result_that_comes_in_the_last_moment_stays(backend: Backend) -> None:
    """After it was found that there is none."""

    async def find(_: Any) -> dict[str, Any]:
        await backend.set_result("1", result_of(7))
        return {"1": result_of(None, is_err=True), "2": result_of(None, is_err=True)}

    assert await backend.runtime.writer.store_missing(find, "test", 5) == ["2"]
    assert (await backend.get_result("1")).return_value == 7


async def test_a_lost_task_that_is_in_the_queue_is_not_given_up(
    database: Database, start_backend: BackendFactory
) -> None:
    """Its broker delivers it again."""
    backend = await start_backend(
        models=build_models(queue=True), track="started", timings=OFTEN, run_migrations=True
    )
    queue = SQLAlchemyBroker(database.dsn, run_migrations=True)
    await queue.startup()
    lost, queued = await start_task(backend, "gone"), await start_task(backend, "gone")
    message = BrokerMessage(task_id=queued, task_name="task", message=b"", labels={})
    await queue.kick(message)
    await age_statuses(database, 61)
    broker = worker_of(backend, worker="us", abandon_lost=True)
    await broker.startup()
    await backend.wait_result(lost, timeout=30)
    assert await states_of(backend, queued) == {"lost"}
    await broker.shutdown()
    await queue.shutdown()


async def test_locked_results_delay_no_beat(
    database: Database, start_backend: BackendFactory
) -> None:
    """Else a worker that looks for lost tasks would seem to be lost itself."""
    timings = Timings(between_beats=0.01, beat=0.1)
    backend = await start_backend(track="started", timings=timings)
    broker = worker_of(backend, worker="us", abandon_lost=True)
    await broker.startup()
    await eventually(are_seen(database, "us"))
    connection = await asyncpg.connect(database.direct_dsn)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE taskiq_results")
            for _ in range(3):
                await wait_for_beat(database, "us")
    finally:
        await connection.close()
    await broker.shutdown()


async def test_nobody_is_told_of_lost_tasks_without_it(
    backend: Backend, database: Database
) -> None:
    broker = worker_of(backend, worker="us")
    await broker.startup()
    task_id = await start_task(backend, "gone")
    await age_statuses(database, 61)
    await eventually(are_seen(database, "us"))
    await wait_for_beat(database, "us")
    assert await states_of(backend, task_id) == {"lost"}
    await broker.shutdown()


async def test_lost_tasks_get_their_extra_values(
    database: Database, start_backend: BackendFactory
) -> None:
    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        tenant: Mapped[str | None]

    parts = [type(m.__name__, (m, Base), {}) for m in (ProgressMixin, StatusMixin, WorkerMixin)]
    engine = make_engine(database.dsn)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    backend = await start_backend(
        models=Models(Result, parts[0], parts[1], Worker=parts[2]),
        run_migrations=False,
        track="started",
        timings=OFTEN,
        extra_values=lambda _, result: {"tenant": type(result.error).__name__},
    )
    broker = worker_of(backend, worker="us", abandon_lost=True)
    await broker.startup()
    task_id = await start_task(backend, "gone")
    await age_statuses(database, 61)
    await backend.wait_result(task_id, timeout=30)
    rows = await database.fetch("SELECT tenant FROM taskiq_results")
    assert rows == [("TaskAbandonedError",)]
    await broker.shutdown()


async def test_giving_up_is_for_brokers_that_deliver_nothing_again(
    start_backend: BackendFactory,
) -> None:
    broker = SQLAlchemyBroker("postgresql://")
    with pytest.raises(ConfigurationError, match="SQLAlchemyBroker does: omit abandon_lost"):
        broker.add_middlewares(TaskMetadataMiddleware(abandon_lost=True))
    with pytest.raises(ConfigurationError, match="abandon_lost needs record_worker=True"):
        TaskMetadataMiddleware(abandon_lost=True, record_worker=False)
    with pytest.raises(ConfigurationError, match="abandon_lost must be True or False"):
        TaskMetadataMiddleware(abandon_lost=1)  # type: ignore[arg-type]  # that is the point
    untracked = await start_backend()
    with pytest.raises(ConfigurationError, match="abandon_lost needs a result backend with track"):
        await worker_of(untracked, abandon_lost=True).startup()


async def test_only_one_gives_up_at_a_time(
    backend: Backend, database: Database, start_backend: BackendFactory
) -> None:
    """Of two workers whose beats meet, the other finds nothing to do."""
    task_id = await start_task(backend, "gone")
    await age_statuses(database, 61)
    other = await start_backend(track="started")
    found: list[int] = []

    async def find(connection: Any) -> Any:
        found.append(len(await backend.runtime.workers.find_lost(connection)))
        found.append(
            len(await other.runtime.database.transact(other.runtime.workers.find_lost, "look"))
        )
        return {}

    assert await backend.runtime.writer.store_missing(find, "test", 5) == []
    assert found == [1, 0]
    assert await states_of(backend, task_id) == {"lost"}
