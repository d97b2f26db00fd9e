"""TaskMetadataMiddleware: what it puts into the rows, and that it costs and breaks nothing."""

import asyncio
import gc
import json
import os
import socket
import weakref
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from taskiq import (
    Context,
    InMemoryBroker,
    SimpleRetryMiddleware,
    TaskiqDepends,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
)
from taskiq.brokers.inmemory_broker import InmemoryResultBackend
from taskiq.exceptions import NoResultError

from taskiq_sa_pg import (
    ConfigurationError,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
)
from taskiq_sa_pg.codec import task_metadata_of
from taskiq_sa_pg.middleware import QUEUED_AT_LABEL
from tests.conftest import BackendFactory, Database
from tests.integration.databases import Log

Backend = SQLAlchemyResultBackend[Any]

ODD_TEXT = "'ü' \"%s\" {} :x \\ \N{SNOWMAN}"


@pytest.fixture
async def backend(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> Backend:
    driver = getattr(request, "param", "asyncpg")
    started: Backend = await start_backend(database.dsn_of(driver))
    return started


each_driver = pytest.mark.parametrize("backend", ["asyncpg", "psycopg"], indirect=True)


def broker_of(backend: Backend, *middlewares: TaskiqMiddleware) -> InMemoryBroker:
    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(*middlewares)
    return broker


async def row_of(database: Database, task_id: str) -> dict[str, Any]:
    [row] = await database.fetch("SELECT * FROM taskiq_results WHERE task_id = $1", task_id)
    found = dict(row)
    for name in ("args", "kwargs", "labels"):
        found[name] = found[name] and json.loads(found[name])
    return found


async def run(
    database: Database, broker: InMemoryBroker, *args: Any, task: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The row of a task that gets these arguments."""
    if task is None:

        async def anything(*_: Any, **__: Any) -> int:
            return 42

        task = broker.task(task_name="anything")(anything)
    sent = await task.kiq(*args, **kwargs)
    await broker.wait_all()
    return await row_of(database, sent.task_id)


@each_driver
async def test_task_worker_and_times_are_in_the_row(database: Database, backend: Backend) -> None:
    before = datetime.now(UTC)
    row = await run(database, broker_of(backend, TaskMetadataMiddleware()), 1, secret="x")
    assert row["task_name"] == "anything"
    assert row["worker"] == f"{socket.gethostname()}:{os.getpid()}"
    assert before <= row["queued_at"] <= row["started_at"] <= datetime.now(UTC)
    assert (row["args"], row["kwargs"]) == (None, None)
    assert row["labels"] == {}


@each_driver
async def test_arguments_are_as_they_were_sent(database: Database, backend: Backend) -> None:
    """Whatever the task does with them, and whatever taskiq makes of them."""
    broker = broker_of(backend, TaskMetadataMiddleware(record_args=True, worker="w\x001"))

    @broker.task(task_name=ODD_TEXT)
    async def spoil(items: list[int], *, day: datetime, **_: Any) -> None:
        assert isinstance(day, datetime)
        items.clear()

    odd = [ODD_TEXT, "nul \x00", 1e300, -0.0, {"$bytes": "x"}, {"$serialized": "x"}]
    day = "2026-11-23T08:30:00"
    row = await run(database, broker, [1, 2], task=spoil, day=day, odd=odd, none=None)
    assert row["args"] == [[1, 2]]
    assert row["kwargs"]["day"] == day
    assert row["kwargs"]["none"] is None
    assert list(row["kwargs"]["odd"]) == ["$serialized"]
    assert row["task_name"] == ODD_TEXT
    assert row["worker"] == "w\\x001"


async def test_redacted_arguments_are_recorded_and_the_others_reach_the_task(
    database: Database, backend: Backend
) -> None:
    seen: list[Any] = []

    async def redact(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        assert name == "login"
        args[0]["password"] = "***"
        kwargs.clear()
        return args, None

    broker = broker_of(backend, TaskMetadataMiddleware(record_args=True, redact=redact))

    @broker.task(task_name="login")
    async def login(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))

    row = await run(database, broker, {"password": "geheim"}, task=login, token="geheim")
    assert seen == [(({"password": "geheim"},), {"token": "geheim"})]
    assert (row["args"], row["kwargs"]) == ([{"password": "***"}], None)


def refuse(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    raise ValueError(f"what is {args}?")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"redact": refuse}, "ValueError"),
        ({"redact": lambda *_: None}, "TypeError"),
        ({"redact": lambda *_: ("text", {})}, "TypeError"),
        ({"redact": lambda *_: ([object()], {})}, "PydanticSerializationError"),
        ({"max_args_bytes": 12}, "they have 15 bytes, more than max_args_bytes=12"),
    ],
    ids=["raises", "None", "text", "object", "large"],
)
async def test_what_cannot_be_recorded_is_logged_and_the_result_is_stored(
    database: Database,
    backend: Backend,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    reason: str,
) -> None:
    """And no secret is in the log."""
    row = await run(
        database,
        broker_of(backend, TaskMetadataMiddleware(record_args=True, **options)),
        "geheim€",
    )
    assert (row["args"], row["kwargs"], row["task_name"]) == (None, None, "anything")
    assert row["started_at"] is not None
    [record] = [r for r in caplog.records if r.name.startswith("taskiq_sa_pg")]
    assert reason in record.getMessage()
    assert "geheim" not in caplog.text


async def test_metadata_cost_no_statement(
    database: Database, start_backend: BackendFactory
) -> None:
    counts = []
    for middlewares in ([], [TaskMetadataMiddleware(record_args=True)]):
        log = Log()
        backend = await start_backend(pool_events=[(log.attach, "connect")], notify=False)
        broker = broker_of(backend, *middlewares)
        log.queries.clear()
        for number in range(5):
            await run(database, broker, number)
        counts.append(len(log.queries))
    assert counts == [5, 5]


async def test_tasks_at_the_same_time_keep_their_own_metadata(
    database: Database, backend: Backend
) -> None:
    broker = broker_of(backend, TaskMetadataMiddleware(record_args=True))
    gate = asyncio.Event()

    @broker.task
    async def wait(number: int) -> int:
        await gate.wait()
        return number

    sent = [await wait.kiq(number) for number in range(20)]
    gate.set()
    await broker.wait_all()
    rows = [await row_of(database, task.task_id) for task in sent]
    assert [row["args"] for row in rows] == [[number] for number in range(20)]
    results = await backend.get_results([task.task_id for task in sent])
    assert [results[task.task_id].return_value for task in sent] == list(range(20))


async def test_a_retry_has_the_times_of_its_own_attempt(
    database: Database, backend: Backend
) -> None:
    broker = broker_of(
        backend, TaskMetadataMiddleware(), SimpleRetryMiddleware(default_retry_label=True)
    )
    ended: list[datetime] = []

    @broker.task(task_name="flaky")
    async def flaky() -> None:
        if not ended:
            await asyncio.sleep(0.01)
            ended.append(datetime.now(UTC))
            raise ValueError("again")

    task = await flaky.kiq()
    while not await backend.is_result_ready(task.task_id):
        await broker.wait_all()
    row = await row_of(database, task.task_id)
    assert row["attempt"] == 1
    assert ended[0] <= row["queued_at"] <= row["started_at"]
    assert QUEUED_AT_LABEL not in row["labels"]


async def test_a_task_that_runs_out_of_time_has_its_metadata(
    database: Database, backend: Backend
) -> None:
    broker = broker_of(backend, TaskMetadataMiddleware())

    @broker.task(timeout=0.01, task_name="slow")
    async def slow() -> None:
        await asyncio.Event().wait()

    row = await run(database, broker, task=slow)
    assert row["is_err"]
    assert row["task_name"] == "slow"
    assert row["started_at"] is not None


@each_driver
async def test_without_the_middleware_a_later_result_leaves_nothing_of_an_earlier_one(
    database: Database, backend: Backend
) -> None:
    """Alone and among others."""
    broker = broker_of(backend, TaskMetadataMiddleware(record_args=True))
    row = await run(database, broker, 1)
    plain = TaskiqResult(is_err=False, return_value=1, execution_time=0.1)
    for others in ([], ["a", "b"]):
        again = await run(database, broker, 1)
        ids = [again["task_id"], *others]
        await asyncio.gather(*[backend.set_result(task_id, plain) for task_id in ids])
        after = await row_of(database, again["task_id"])
        names = ("task_name", "args", "kwargs", "worker", "queued_at", "started_at")
        assert [after[name] for name in names] == [None] * 6
    assert (await row_of(database, row["task_id"]))["args"] == [1]


@each_driver
async def test_rows_with_and_without_metadata_share_a_batch(
    database: Database, backend: Backend
) -> None:
    broker = broker_of(backend, TaskMetadataMiddleware(record_args=True))
    described = await run(database, broker, "x")
    result = await backend.get_result(described["task_id"])
    message = TaskiqMessage(task_id="m", task_name="n", labels={}, args=[1], kwargs={})
    [middleware] = [m for m in broker.middlewares if isinstance(m, TaskMetadataMiddleware)]
    await middleware.post_execute(await middleware.pre_execute(message), result)
    plain = result.model_construct(**result.model_dump(exclude={"error"}), error=None)
    await asyncio.gather(
        *[backend.set_result(f"{i}", result if i > 4 else plain) for i in range(10)]
    )
    rows = [await row_of(database, f"{i}") for i in range(10)]
    assert [row["args"] for row in rows] == [[1] if i > 4 else None for i in range(10)]


async def test_a_sender_without_the_middleware_leaves_queued_at_empty(
    database: Database, backend: Backend
) -> None:
    broker = broker_of(backend, TaskMetadataMiddleware())
    sender = broker.middlewares[0]
    sender.__class__ = type("WorkerOnly", (TaskMetadataMiddleware,), {"pre_send": lambda _, m: m})
    row = await run(database, broker)
    assert row["queued_at"] is None
    assert row["started_at"] is not None


@pytest.mark.parametrize("label", ["yesterday", 7, "0001-01-01T00:00:00+05:00"])
async def test_a_label_that_is_no_time_is_left_out(
    database: Database, backend: Backend, caplog: pytest.LogCaptureFixture, label: Any
) -> None:
    class Spoil(TaskiqMiddleware):
        def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
            message.labels[QUEUED_AT_LABEL] = label
            return message

    row = await run(database, broker_of(backend, TaskMetadataMiddleware(), Spoil()))
    assert row["queued_at"] is None
    assert row["labels"] == {}
    assert "is not a time" in caplog.text


async def test_with_another_result_backend_it_does_nothing_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend: InmemoryResultBackend[Any] = InmemoryResultBackend()
    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(record_args=True))

    @broker.task
    async def labels(context: Context = TaskiqDepends()) -> Any:
        return context.message.labels

    for _ in range(2):
        task = await labels.kiq()
        await broker.wait_all()
        assert (await task.wait_result()).return_value == {}
        assert vars(backend.results[task.task_id]).keys() == TaskiqResult.model_fields.keys()
    assert caplog.text.count("TaskMetadataMiddleware does nothing") == 1


async def test_nothing_is_kept_of_tasks_whose_result_never_comes(backend: Backend) -> None:
    messages: list[weakref.ref[TaskiqMessage]] = []

    class Watch(TaskiqMiddleware):
        def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
            assert task_metadata_of(message).started_at is not None
            messages.append(weakref.ref(message))
            return message

    broker = broker_of(backend, TaskMetadataMiddleware(record_args=True), Watch())

    @broker.task
    async def give_up() -> None:
        raise NoResultError

    for _ in range(3):
        await give_up.kiq()
    await broker.wait_all()
    broker.custom_dependency_context.clear()  # where taskiq itself keeps the last message
    gc.collect()
    assert len(messages) == 3
    assert [message() for message in messages] == [None] * 3


async def test_other_middlewares_and_requeued_messages_see_nothing_of_it(
    database: Database, backend: Backend
) -> None:
    dumped: list[Any] = []

    class Admin(TaskiqMiddleware):
        def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
            dumped.append((message.model_dump(mode="json"), result.model_dump(mode="json")))

    broker = broker_of(backend, Admin(), TaskMetadataMiddleware(record_args=True))

    @broker.task(task_name="requeue")
    async def requeue(context: Context = TaskiqDepends()) -> None:
        if not dumped:
            await context.requeue()

    task = await requeue.kiq()
    while len(dumped) < 2:
        await broker.wait_all()
        await asyncio.sleep(0)
    await broker.wait_all()
    for message, result in dumped:
        assert message.keys() == TaskiqMessage.model_fields.keys()
        assert result.keys() == TaskiqResult.model_fields.keys()
        assert QUEUED_AT_LABEL not in result["labels"]
    row = await row_of(database, task.task_id)
    assert timedelta(0) <= row["started_at"] - row["queued_at"] < timedelta(minutes=1)


async def test_a_message_that_another_middleware_makes_anew_keeps_its_name(
    database: Database, backend: Backend
) -> None:
    class Renew(TaskiqMiddleware):
        def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
            return TaskiqMessage(**message.model_dump())

    row = await run(database, broker_of(backend, TaskMetadataMiddleware(), Renew()))
    assert row["task_name"] == "anything"
    assert row["labels"] == {}


def test_one_for_each_broker() -> None:
    middleware = TaskMetadataMiddleware()
    InMemoryBroker().add_middlewares(middleware)
    with pytest.raises(ConfigurationError, match="create one for each broker"):
        InMemoryBroker().add_middlewares(middleware)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redact": refuse}, "redact needs record_args=True"),
        ({"redact": 7, "record_args": True}, "redact must be a callable"),
        ({"worker": "w", "record_worker": False}, "worker needs record_worker=True"),
        ({"max_args_bytes": 0}, "max_args_bytes must be a whole number of 1 or more, not 0"),
        ({"max_args_bytes": "9"}, "max_args_bytes must be a whole number of 1 or more, not '9'"),
        ({"record_args": "no"}, "record_args must be True or False, not 'no'"),
        ({"record_worker": "no"}, "record_worker must be True or False, not 'no'"),
        ({"worker": 7}, "worker must be a str or None, not 7"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TaskMetadataMiddleware(**options)
