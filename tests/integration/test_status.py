"""track="started": what tasks are at before their results, and that it costs and breaks little."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped
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
    Models,
    ProgressMixin,
    ResultMixin,
    SchemaError,
    SQLAlchemyResultBackend,
    StatusMixin,
    TaskMetadataMiddleware,
    TaskStatus,
    build_models,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database, eventually
from tests.integration.databases import Log
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


@pytest.fixture(params=["asyncpg-VarChar", "psycopg-Uuid"])
async def backend(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> Backend:
    driver, field = request.param.split("-")
    started: Backend = await start_backend(
        database.dsn_of(driver), field_for_task_id=field, track="started"
    )
    return started


def broker_of(backend: Backend, *middlewares: TaskiqMiddleware) -> HeldBroker:
    broker = HeldBroker()
    broker.with_result_backend(backend)
    broker.add_middlewares(*middlewares, TaskMetadataMiddleware(worker="us"))
    return broker


async def state_of(backend: Backend, task_id: str) -> str:
    return (await backend.get_status(task_id)).state


async def rows_of_status(database: Database) -> int:
    [row] = await database.fetch("SELECT count(*) FROM taskiq_results_status")
    count: int = row["count"]
    return count


async def running(backend: Backend) -> list[str]:
    return [UUID(status.task_id).hex for status in await backend.get_running()]


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


async def test_times_are_in_utc(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_status(TaskStatus(task_id, "started", None, 1, AT, AT + MINUTE, "us"))
    assert await backend.get_status(task_id) == TaskStatus(
        task_id, "started", None, 1, AT, AT + MINUTE, "us"
    )
    [status] = await backend.get_running()
    assert {status.queued_at.tzinfo, status.started_at.tzinfo} == {UTC}  # type: ignore[union-attr]  # both are set


async def test_failures_and_what_is_not_there(backend: Backend) -> None:
    failed, missing = new_id(), new_id()
    await backend.set_result(failed, result_of(None, is_err=True, error=ValueError("no")))
    assert await state_of(backend, failed) == "failed"
    assert await backend.get_status(missing) == TaskStatus(missing, "unknown")


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


async def test_a_failure_that_is_stored_and_retried_is_retrying(backend: Backend) -> None:
    broker = broker_of(backend, SimpleRetryMiddleware(no_result_on_retry=False))

    @broker.task(retry_on_error=True, max_retries=2)
    async def fails() -> None:
        raise ValueError

    sent = await fails.kiq()
    await broker.deliver()
    assert await backend.is_result_ready(sent.task_id)
    assert await state_of(backend, sent.task_id) == "retrying"
    await broker.deliver()
    assert await state_of(backend, sent.task_id) == "failed"


async def test_a_failure_that_is_retried_later_is_retrying(backend: Backend) -> None:
    broker = broker_of(backend, TakesFailuresAway())

    @broker.task
    async def fails() -> None:
        raise ValueError

    sent = await fails.kiq()
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


async def test_a_later_attempt_and_execution_stays(backend: Backend) -> None:
    task_id, other_id = new_id(), new_id()

    async def after(state: Any, attempt: int, started_at: datetime | None) -> tuple[Any, ...]:
        await backend.set_status(TaskStatus(task_id, state, None, attempt, None, started_at))
        # Beside another, which has another statement.
        await asyncio.gather(
            *[
                backend.set_status(TaskStatus(i, state, None, attempt, None, started_at))
                for i in (other_id, new_id())
            ]
        )
        found = [await backend.get_status(i) for i in (task_id, other_id)]
        [status] = {(f.state, f.attempt, f.started_at) for f in found}
        return status

    assert await after("queued", 1, None) == ("queued", 1, None)
    assert await after("started", 1, AT) == ("started", 1, AT)
    assert await after("started", 0, AT + MINUTE) == ("started", 1, AT)
    assert await after("retrying", 1, AT - MINUTE) == ("started", 1, AT)
    assert await after("unknown", 0, None) == ("started", 1, AT)
    assert await after("started", 1, AT + MINUTE) == ("started", 1, AT + MINUTE)
    assert await after("retrying", 2, None) == ("retrying", 2, None)
    assert await after("unknown", 2, None) == ("unknown", 0, None)


async def test_of_calls_at_once_the_latest_attempt_counts(backend: Backend) -> None:
    task_id = new_id()
    await asyncio.gather(
        *[
            backend.set_status(TaskStatus(task_id, "started", attempt=attempt))
            for attempt in (0, 3, 1, 2)
        ]
    )
    assert (await backend.get_status(task_id)).attempt == 3


@pytest.mark.parametrize("others", [0, 3])
async def test_a_result_ends_its_own_attempt_and_no_later_one(
    others: int, backend: Backend, database: Database
) -> None:
    ids = {attempt: new_id() for attempt in range(4)}
    for attempt, task_id in ids.items():
        await backend.set_status(TaskStatus(task_id, "started", attempt=attempt))
    for task_id in ids.values():
        labels = {"_retries": 1}
        await asyncio.gather(
            backend.set_result(task_id, result_of(1, labels=labels)),
            *[backend.set_result(new_id(), result_of(1)) for _ in range(others)],
        )
    found = [await state_of(backend, task_id) for task_id in ids.values()]
    assert found == ["succeeded", "succeeded", "started", "started"]
    assert await rows_of_status(database) == 2
    assert await running(backend) == sorted([ids[2], ids[3]])


async def test_a_task_id_that_is_used_again_is_queued_again(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    await backend.set_status(TaskStatus(task_id, "queued"))
    assert await backend.get_status(task_id) == TaskStatus(task_id, "queued")
    await backend.set_status(TaskStatus(task_id, "started"))
    assert await running(backend) == [task_id]
    await backend.set_result(task_id, result_of(2))
    assert await state_of(backend, task_id) == "succeeded"


async def test_a_result_of_a_process_that_does_not_track_counts(
    backend: Backend, database: Database, start_backend: BackendFactory
) -> None:
    field = backend.models.config.field_for_task_id
    other = await start_backend(field_for_task_id=field)
    task_id = new_id()
    await backend.set_status(TaskStatus(task_id, "started"))
    assert await state_of(other, task_id) == "started"
    assert await running(other) == [task_id]
    await other.set_result(task_id, result_of(1))
    for each in (backend, other):
        assert await state_of(each, task_id) == "succeeded"
        assert await running(each) == []
    assert await rows_of_status(database) == 1


async def test_an_expired_result_is_told_until_it_is_pruned(
    backend: Backend, database: Database
) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(1, labels={"result_ttl": 60}))
    await database.fetch("UPDATE taskiq_results SET expires_at = now()")
    assert await state_of(backend, task_id) == "expired"
    assert (await backend.prune()).results == 1
    assert await state_of(backend, task_id) == "unknown"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_result_that_is_read_once_takes_its_status_along(
    driver: str, database: Database, start_backend: BackendFactory
) -> None:
    dsn = database.dsn_of(driver)
    backend = await start_backend(dsn, keep_results=False, track="started")
    plain = await start_backend(dsn)
    await backend.set_status(TaskStatus("1", "started"))
    await plain.set_result("1", result_of(1))
    assert (await backend.get_result("1")).return_value == 1
    assert await backend.get_status("1") == TaskStatus("1", "unknown")


async def test_what_is_forgotten_takes_its_status_along(
    backend: Backend, database: Database
) -> None:
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        await backend.set_status(TaskStatus(task_id, "started"))
    assert await backend.forget(ids[:2]) == 0
    assert await running(backend) == ids[2:]
    assert await rows_of_status(database) == 1


async def test_pruning_deletes_old_statuses_too(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(track="started", progress_ttl=MINUTE)
    plain = await start_backend()
    for task_id in ("old", "new", "finished", "expired"):
        await backend.set_status(TaskStatus(task_id, "started"))
    await plain.set_result("finished", result_of(1))
    await plain.set_result("expired", result_of(1, labels={"result_ttl": 60}))
    await database.fetch("UPDATE taskiq_results SET expires_at = now() WHERE expires_at > now()")
    await database.fetch(
        "UPDATE taskiq_results_status SET updated_at = now() - interval '2 min' "
        "WHERE task_id <> 'new'"
    )
    pruned = await backend.prune()
    assert (pruned.results, pruned.statuses, pruned.is_complete) == (1, 1, True)
    rows = await database.fetch("SELECT task_id FROM taskiq_results_status ORDER BY 1")
    assert [row["task_id"] for row in rows] == ["finished", "new"]


async def test_calls_at_once_share_statements(
    database: Database, start_backend: BackendFactory
) -> None:
    log = Log()
    backend = await start_backend(
        track="started", notify=False, pool_events=[(log.attach, "connect")]
    )
    broker = broker_of(backend)

    @broker.task
    async def nothing() -> None: ...

    sent = await asyncio.gather(*[nothing.kiq() for _ in range(200)])
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


async def test_extra_values_go_with_it(database: Database, start_backend: BackendFactory) -> None:
    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        tenant: Mapped[str | None]

    class Progress(ProgressMixin, Base): ...

    class Status(StatusMixin, Base):
        note: Mapped[str | None]

    engine = make_engine(database.dsn)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    backend = await start_backend(
        models=Models(Result, Progress, Status),
        run_migrations=False,
        track="started",
        extra_values=lambda task_id, _: {"tenant": "us"} if task_id < "3" else {},
    )
    for size in (1, 5):
        ids = [str(i) for i in range(size)]
        for i in ids:
            await backend.set_status(TaskStatus(i, "started"))
        await asyncio.gather(*[backend.set_result(i, result_of(1)) for i in ids])
        assert await rows_of_status(database) == 0
        assert [await state_of(backend, i) for i in ids] == ["succeeded"] * size


async def test_a_status_that_cannot_be_stored_in_time_stops_no_task(
    backend: Backend,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("taskiq_sa_pg.lifecycle.RETRY_TIMEOUT", 0.1)
    broker = broker_of(backend)

    @broker.task
    async def nothing() -> int:
        return 42

    async def said_twice() -> bool:
        return len(caplog.messages) == 2

    connection = await asyncpg.connect(database.direct_dsn)
    try:
        await connection.execute("BEGIN; LOCK TABLE taskiq_results_status")
        sent = await nothing.kiq()
        execution = asyncio.create_task(broker.deliver())
        await eventually(said_twice)
    finally:
        await connection.close()
    await execution
    assert (await backend.get_result(sent.task_id)).return_value == 42
    assert [m.partition(": ")[2] for m in caplog.messages if sent.task_id in m][:2] == [
        f"that it is {state} is not recorded: PostgreSQL did not answer within 0.1 s"
        for state in ("queued", "started")
    ]


async def test_a_sender_that_was_not_started_sends(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    broker = broker_of(SQLAlchemyResultBackend(database.dsn, track="started"))

    @broker.task
    async def nothing() -> None: ...

    await nothing.kiq()
    assert len(broker.held) == 1
    assert "that it is queued is not recorded: the result backend is not started" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        ("DROP TABLE taskiq_results_status", "lacks the status table of step 3"),
        ("ALTER TABLE taskiq_results_status RENAME TO other", "lacks the status table of step 3"),
    ],
)
async def test_without_the_table_no_result_is_lost(
    break_it: str,
    said: str,
    backend: Backend,
    database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await database.fetch(break_it)
    ids = [new_id() for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        await backend.set_result(ids[0], result_of(1))
        await asyncio.gather(*[backend.set_result(i, result_of(1)) for i in ids])
    assert [said in m for m in caplog.messages].count(True) == 1
    assert [await state_of(backend, i) for i in ids] == ["succeeded"] * 3
    assert await backend.get_running() == []
    await backend.set_status(TaskStatus(ids[0], "started"))
    assert (await backend.prune()).is_complete


async def test_a_sender_without_the_table_is_told_once(
    backend: Backend, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await database.fetch("DROP TABLE taskiq_results_status")
    broker = broker_of(backend)

    @broker.task
    async def nothing() -> None: ...

    for _ in range(3):
        await nothing.kiq()
    [message] = caplog.messages
    assert "lacks the status table of step 3" in message
    assert len(broker.held) == 3


async def test_who_asks_without_the_table_gets_what_results_tell(
    backend: Backend, database: Database
) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    await database.fetch("DROP TABLE taskiq_results_status")
    assert await backend.get_running() == []
    assert await state_of(backend, task_id) == "succeeded"
    assert await state_of(backend, new_id()) == "unknown"
    assert await backend.forget([task_id]) == 1


async def test_startup_wants_the_table_where_tasks_are_tracked(
    database: Database, start_backend: BackendFactory
) -> None:
    await start_backend()
    await database.fetch("DROP TABLE taskiq_results_status")
    plain = await start_backend(run_migrations=False)
    assert await plain.get_running() == []
    with pytest.raises(SchemaError, match=r"taskiq_results_status does not exist.*alembic upgrade"):
        await start_backend(run_migrations=False, track="started")


async def test_a_broker_without_the_middleware_is_told_once(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        await backend.set_result(new_id(), result_of(1))
    assert [
        m.endswith("broker.add_middlewares(TaskMetadataMiddleware())") for m in caplog.messages
    ] == [True]


async def test_nothing_is_written_without_track(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend()
    broker = broker_of(backend)

    @broker.task
    async def nothing() -> None: ...

    sent = await nothing.kiq()
    assert await state_of(backend, sent.task_id) == "unknown"
    await broker.deliver()
    assert await state_of(backend, sent.task_id) == "succeeded"
    with pytest.raises(ConfigurationError, match='for backends with track="started"'):
        await backend.set_status(TaskStatus("1", "started"))


async def test_the_longest_running_come_first_and_not_too_many(backend: Backend) -> None:
    ids = [new_id() for _ in range(5)]
    for i, task_id in enumerate(ids):
        await backend.set_status(TaskStatus(task_id, "started", started_at=AT - i * MINUTE))
    assert await running(backend) == ids[::-1]
    first: Sequence[TaskStatus] = await backend.get_running(2)
    assert [UUID(status.task_id).hex for status in first] == [ids[4], ids[3]]
    with pytest.raises(ConfigurationError, match="limit must be 1 or more"):
        await backend.get_running(0)


async def test_only_what_no_result_says_can_be_set(backend: Backend) -> None:
    for state in ("succeeded", "failed", "expired", "odd"):
        with pytest.raises(ConfigurationError, match="the others come from results"):
            await backend.set_status(TaskStatus("1", state))  # type: ignore[arg-type]  # that is the point


def test_arguments_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match='track must be "started" or None'):
        SQLAlchemyResultBackend("postgresql://", track="everything")  # type: ignore[arg-type]  # that is the point
    models = build_models()
    with pytest.raises(ConfigurationError, match="track needs a status table"):
        SQLAlchemyResultBackend(
            "postgresql://", track="started", models=Models(models.Result, models.Progress)
        )
