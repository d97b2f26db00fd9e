"""track="started" with taskiq: what its hooks tell of tasks, and that they cost little."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from taskiq import (
    BrokerMessage,
    Context,
    InMemoryBroker,
    SimpleRetryMiddleware,
    TaskiqDepends,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
)
from taskiq.exceptions import NoResultError

from taskiq_sa_pg import (
    ConfigurationError,
    SQLAlchemyResultBackend,
    StorageError,
    TaskMetadataMiddleware,
    TaskStatus,
)
from taskiq_sa_pg.timings import Timings
from tests.conftest import BackendFactory, Database, eventually
from tests.integration.databases import Log
from tests.integration.test_status import rows_of_status, running, state_of
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]

MINUTE = timedelta(minutes=1)
AT = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


class HeldBroker(InMemoryBroker):
    """Keeps what is sent until it is delivered."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[bytes] = []

    async def kick(self, message: BrokerMessage) -> None:
        self.held.append(message.message)

    async def deliver(self) -> None:
        """Executes what was sent first."""
        await self.receiver.callback(message=self.held.pop(0))


class Step:
    """A task that waits in the middle until it may go on."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.has_begun.set()
        await self.may_end.wait()
        return 42


class TakesFailuresAway(TaskiqMiddleware):
    """As one that sends the task again later: at a time, or from another place."""

    def on_error(
        self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException
    ) -> None:
        result.error = NoResultError()


async def nothing() -> int:
    return 42


async def fail() -> None:
    raise ValueError


@pytest.fixture
async def backend(start_backend: BackendFactory) -> Backend:
    started: Backend = await start_backend(track="started")
    return started


def broker_of(backend: Backend, *middlewares: TaskiqMiddleware) -> HeldBroker:
    broker = HeldBroker()
    broker.with_result_backend(backend)
    broker.add_middlewares(*middlewares, TaskMetadataMiddleware(worker="us"))
    return broker


async def test_a_task_from_the_queue_to_its_result(backend: Backend, database: Database) -> None:
    broker, step = broker_of(backend), Step()

    @broker.task(task_name="häppens")
    async def task() -> int:
        return await step()

    before = datetime.now(UTC)
    sent = await task.kiq()
    queued = await backend.get_status(sent.task_id)
    assert queued == TaskStatus(sent.task_id, "queued", "häppens", 0, queued.queued_at)
    assert queued.queued_at is not None
    assert before <= queued.queued_at <= datetime.now(UTC)
    assert await running(backend) == []
    execution = asyncio.create_task(broker.deliver())
    await step.has_begun.wait()
    started = await backend.get_status(sent.task_id)
    assert started.started_at is not None
    assert queued.queued_at <= started.started_at <= datetime.now(UTC)
    assert started == TaskStatus(
        sent.task_id, "started", "häppens", 0, queued.queued_at, started.started_at, "us"
    )
    assert await running(backend) == [sent.task_id]
    step.may_end.set()
    await execution
    finished = await backend.get_status(sent.task_id)
    assert finished.finished_at is not None
    assert finished.finished_at - started.started_at < MINUTE
    assert finished == TaskStatus(
        *(sent.task_id, "succeeded", "häppens", 0, queued.queued_at, started.started_at, "us"),
        finished.finished_at,
    )
    assert await running(backend) == []
    assert await rows_of_status(database) == 0


async def test_retries_count_the_attempts(backend: Backend, database: Database) -> None:
    broker = broker_of(backend, SimpleRetryMiddleware())
    attempts = 0

    @broker.task(retry_on_error=True)
    async def third_time_lucky() -> int:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise ValueError(attempts)
        return attempts

    sent = await third_time_lucky.kiq()
    seen = []
    while broker.held:
        await broker.deliver()
        status = await backend.get_status(sent.task_id)
        seen.append((status.state, status.attempt, status.started_at is None))
    assert seen == [("retrying", 1, True), ("retrying", 2, True), ("succeeded", 2, False)]
    assert await rows_of_status(database) == 0


async def test_a_task_id_that_is_used_again_begins_anew(
    backend: Backend, database: Database
) -> None:
    """Whatever the last attempt of the run before was, and if its result comes late."""
    broker = broker_of(backend, SimpleRetryMiddleware())
    fails = [True, False, False, True, False, False]
    late = Step()

    @broker.task(retry_on_error=True, task_name="nightly")
    async def nightly(number: int) -> int:
        if fails.pop(0):
            raise ValueError(number)
        if number == 2:
            await late()
        return number

    async def send(number: int) -> None:
        await nightly.kicker().with_task_id("nightly").kiq(number)

    await send(0)
    await broker.deliver()
    await broker.deliver()
    assert (await backend.get_status("nightly")).attempt == 1
    await send(1)
    assert await state_of(backend, "nightly") == "queued"
    await broker.deliver()
    assert (await backend.get_result("nightly")).return_value == 1
    await send(2)
    await broker.deliver()
    execution = asyncio.create_task(broker.deliver())
    await late.has_begun.wait()
    await send(3)
    late.may_end.set()
    await execution
    assert (await backend.get_result("nightly")).return_value == 2
    assert await state_of(backend, "nightly") == "queued"
    await broker.deliver()
    assert (await backend.get_result("nightly")).return_value == 3
    assert await rows_of_status(database) == 0


async def test_a_failure_that_is_stored_and_retried_is_retrying(backend: Backend) -> None:
    broker = broker_of(backend, SimpleRetryMiddleware(no_result_on_retry=False))

    sent = await broker.register_task(fail, retry_on_error=True, max_retries=2).kiq()
    await broker.deliver()
    assert await backend.is_result_ready(sent.task_id)
    assert await state_of(backend, sent.task_id) == "retrying"
    await broker.deliver()
    assert await state_of(backend, sent.task_id) == "failed"


async def test_a_failure_that_is_retried_later_is_retrying(backend: Backend) -> None:
    broker = broker_of(backend, TakesFailuresAway())

    sent = await broker.register_task(fail).kiq()
    await broker.deliver()
    status = await backend.get_status(sent.task_id)
    assert (status.state, status.attempt, status.worker) == ("retrying", 0, "us")


async def test_a_requeued_task_is_queued_again(backend: Backend) -> None:
    broker = broker_of(backend)

    @broker.task
    async def twice(context: Context = TaskiqDepends()) -> int:
        if "X-Taskiq-requeue" not in context.message.labels:
            await context.requeue()
        return 1

    sent = await twice.kiq()
    await broker.deliver()
    assert await state_of(backend, sent.task_id) == "queued"
    await broker.deliver()
    assert await state_of(backend, sent.task_id) == "succeeded"


async def test_a_requeued_task_that_runs_elsewhere_stays_started(backend: Backend) -> None:
    """Its second execution begins before the first has ended."""
    broker, step = broker_of(backend), Step()
    executions: list[asyncio.Task[None]] = []

    @broker.task
    async def twice(context: Context = TaskiqDepends()) -> int:
        if "X-Taskiq-requeue" in context.message.labels:
            return await step()
        try:
            await context.requeue()
        finally:
            executions.append(asyncio.create_task(broker.deliver()))
            await step.has_begun.wait()
        return 0

    sent = await twice.kiq()
    await broker.deliver()
    assert await running(backend) == [sent.task_id]
    step.may_end.set()
    await executions[0]
    assert await state_of(backend, sent.task_id) == "succeeded"


async def test_a_task_that_wants_no_result_is_forgotten(
    backend: Backend, database: Database
) -> None:
    broker = broker_of(backend)

    @broker.task
    async def gone(times: int, context: Context = TaskiqDepends()) -> None:
        if int(context.message.labels.get("X-Taskiq-requeue", 0)) < times:
            await context.requeue()
        raise NoResultError

    for times in (0, 1):
        sent = await gone.kiq(times)
        while broker.held:
            await broker.deliver()
        assert await state_of(backend, sent.task_id) == "unknown"
    assert await rows_of_status(database) == 0


async def test_calls_at_once_share_statements(
    database: Database, start_backend: BackendFactory
) -> None:
    log = Log()
    backend = await start_backend(
        track="started", notify=False, pool_events=[(log.attach, "connect")]
    )
    broker = broker_of(backend)

    task = broker.register_task(nothing)
    sent = await asyncio.gather(*[task.kiq() for _ in range(200)])
    queued = log.count('INSERT INTO "taskiq_results_status"')
    await asyncio.gather(*[broker.deliver() for _ in sent])
    started = log.count('INSERT INTO "taskiq_results_status"') - queued
    results = log.count('INSERT INTO "taskiq_results" ')
    asked = await asyncio.gather(*[state_of(backend, task.task_id) for task in sent])
    assert asked == ["succeeded"] * 200
    assert 1 <= queued < 20
    assert 1 <= started < 20
    assert 1 <= results < 20
    assert log.count("asked") < 20
    deletions = [q for q in log.queries if 'DELETE FROM "taskiq_results_status"' in q]
    assert all('INSERT INTO "taskiq_results" ' in query for query in deletions)
    assert len(deletions) == results


async def test_a_status_that_cannot_be_stored_in_time_stops_no_task(
    database: Database, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await start_backend(track="started", timings=Timings(status_retry=0.1))
    broker = broker_of(backend)

    def said() -> list[str]:
        return [m.partition(": ")[2] for m in caplog.messages if "is not recorded" in m]

    async def said_twice() -> bool:
        return len(said()) == 2

    connection = await asyncpg.connect(database.direct_dsn)
    try:
        await connection.execute("BEGIN; LOCK TABLE taskiq_results_status")
        sent = await broker.register_task(nothing).kiq()
        execution = asyncio.create_task(broker.deliver())
        await eventually(said_twice)
    finally:
        await connection.close()
    await execution
    assert (await backend.get_result(sent.task_id)).return_value == 42
    assert said()[:2] == [
        f"status {state} is not recorded: PostgreSQL did not answer within 0.1 s"
        for state in ("queued", "started")
    ]


async def test_a_status_has_a_retry_limit_of_its_own(
    database: Database, start_backend: BackendFactory
) -> None:
    """A task waits for it, and not for as long as a result is tried to be stored."""
    backend = await start_backend(
        track="started", command_timeout=0.2, timings=Timings(status_retry=0)
    )
    connection = await asyncpg.connect(database.direct_dsn)
    try:
        await connection.execute("BEGIN; LOCK TABLE taskiq_results_status")
        for state in ("queued", "unknown"):
            async with asyncio.timeout(5):
                with pytest.raises(StorageError, match="did not answer in time"):
                    await backend.set_status(TaskStatus(new_id(), state))
    finally:
        await connection.close()


async def test_a_sender_that_was_not_started_sends(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    broker = broker_of(SQLAlchemyResultBackend(database.dsn, track="started"))

    await broker.register_task(nothing).kiq()
    assert len(broker.held) == 1
    assert "status queued is not recorded: the result backend is not started" in caplog.text


async def test_nothing_is_written_without_track(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend()
    broker = broker_of(backend)

    sent = await broker.register_task(nothing).kiq()
    assert await state_of(backend, sent.task_id) == "unknown"
    await broker.deliver()
    assert await state_of(backend, sent.task_id) == "succeeded"
    with pytest.raises(ConfigurationError, match='needs a backend with track="started"'):
        await backend.set_status(TaskStatus("1", "started"))


async def test_a_broker_without_the_middleware_is_told_once(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        await backend.set_result(new_id(), result_of(1))
    assert [
        m.endswith("broker.add_middlewares(TaskMetadataMiddleware())") for m in caplog.messages
    ] == [True]


async def test_a_result_that_another_middleware_stores_is_no_sign_of_a_missing_one(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    class StoresAnother(TaskiqMiddleware):
        async def on_error(
            self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException
        ) -> None:
            await backend.set_result(f"after {message.task_id}", result_of(None, is_err=True))

    broker = broker_of(backend, StoresAnother())
    sent = await broker.register_task(fail).kiq()
    await broker.deliver()
    assert await backend.is_result_ready(f"after {sent.task_id}")
    assert "TaskMetadataMiddleware" not in caplog.text
