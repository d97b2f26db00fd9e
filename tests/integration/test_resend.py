"""resend(): a task that has finished is sent again, from what was recorded of it."""

import math
from datetime import date
from typing import Any

import pytest
from taskiq import BrokerMessage, InMemoryBroker, SimpleRetryMiddleware
from taskiq.exceptions import SendTaskError
from taskiq.serializers import JSONSerializer

from taskiq_sa_pg import (
    ConfigurationError,
    NotResendableError,
    ResultIsMissingError,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
)
from tests.conftest import BackendFactory, Database
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]


class Sink(InMemoryBroker):
    """Keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[BrokerMessage] = []

    async def kick(self, message: BrokerMessage) -> None:
        self.sent.append(message)

    @property
    def last(self) -> Any:
        message = self.formatter.loads(self.sent[-1].message)
        message.parse_labels()
        return message


@pytest.fixture(params=["asyncpg-VarChar-Bytea", "psycopg-Uuid-Jsonb"])
async def backend(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> Backend:
    driver, task_id, payload = request.param.split("-")
    started: Backend = await start_backend(
        database.dsn_of(driver), field_for_task_id=task_id, field_for_payload=payload
    )
    return started


def broker_of(backend: Backend, **options: Any) -> InMemoryBroker:
    broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
    broker.add_middlewares(
        SimpleRetryMiddleware(), TaskMetadataMiddleware(**{"record_args": True, **options})
    )
    return broker


async def fail(*_args: Any, **_kwargs: Any) -> None:
    raise ValueError


async def test_a_failed_task_succeeds_when_it_is_sent_again(backend: Backend) -> None:
    broker, calls = broker_of(backend), []

    @broker.task(task_name="add")
    async def add(*args: Any, **kwargs: Any) -> int:
        calls.append((args, kwargs))
        if len(calls) == 1:
            raise ValueError
        return 42

    first = await add.kicker().with_labels(user="42", size=7, is_big=True).kiq(1, [None], a="ä")
    second = await backend.resend(broker, first.task_id)
    assert second.task_id != first.task_id
    result = await second.wait_result(timeout=10)
    assert result.return_value == 42
    assert calls == [((1, [None]), {"a": "ä"})] * 2
    assert result.labels == {
        "user": "42",
        "size": 7,
        "is_big": True,
        "rerun_of": first.task_id,
    }
    assert (await backend.get_result(first.task_id)).is_err
    third = await backend.resend(broker, second.task_id)
    assert (await third.get_result()).labels["rerun_of"] == second.task_id


async def test_values_that_jsonb_cannot_hold_come_back_whole(backend: Backend) -> None:
    odd = [
        "\x00",
        "\ud800",
        1e300,
        -0.0,
        {"$bytes": "x"},
        {"$serialized": "x"},
        10**400,
        "x" * 9999,
    ]
    broker, sink = broker_of(backend), Sink()
    task = broker.register_task(fail, "fail")
    sent = await task.kiq(*odd, odd=odd)
    await backend.resend(sink, sent.task_id)
    assert sink.last.args == odd
    assert math.copysign(1, sink.last.args[3]) == -1
    assert sink.last.kwargs == {"odd": odd}


async def test_the_task_need_not_be_known_and_labels_of_a_message_stay_behind(
    backend: Backend,
) -> None:
    broker, sink = broker_of(backend), Sink()
    labels: dict[str, Any] = {
        "retry_on_error": True,
        "max_retries": 2,
        "X-Taskiq-requeue": 1,
        "delay": 0,
        "schedule_id": "7",
        "taskiq_sa_pg_x": "y",
        "traceparent": "00",
        "priority": 3,
        "raw": b"\xff",
    }
    sent = await broker.register_task(fail, "fail").kicker().with_labels(**labels).kiq(1)
    assert (await backend.get_result(sent.task_id)).labels["_retries"] == 1
    again = await backend.resend(sink, sent.task_id)
    assert sink.last.task_id == again.task_id
    assert sink.last.task_name == "fail"
    assert sink.last.labels == {
        "retry_on_error": True,
        "max_retries": 2,
        "priority": 3,
        "raw": b"\xff",
        "rerun_of": sent.task_id,
    }
    sink.register_task(fail, "fail", delay=30, priority=7)
    await backend.resend(sink, sent.task_id)
    assert (sink.last.labels["delay"], sink.last.labels["priority"]) == (30, 3), "the task's own"


@pytest.mark.parametrize(
    ("redact", "is_redacted"),
    [
        (lambda _, args, kwargs: (args, kwargs), False),
        (lambda _, args, kwargs: ([*args], {"b": kwargs["b"], "a": kwargs["a"]}), False),
        (lambda _, args, kwargs: (args, kwargs | {"a": "***"}), True),
        (lambda _, args, kwargs: (args, kwargs.update(a="***") or kwargs), True),
        (lambda _, args, kwargs: ([True], kwargs), True),
        (lambda _, args, kwargs: (None, kwargs), True),
    ],
    ids=["nothing", "order", "a copy", "in place", "a bool for a number", "all"],
)
async def test_what_was_redacted_is_refused(
    redact: Any, is_redacted: bool, backend: Backend
) -> None:
    broker, sink = broker_of(backend, redact=redact), Sink()
    sent = await broker.register_task(fail, "fail").kiq(1, a="secret", b="b")
    labels = (await backend.get_result(sent.task_id)).labels
    assert labels == ({"taskiq_sa_pg_redacted": True} if is_redacted else {})
    if is_redacted:
        with pytest.raises(NotResendableError, match="its arguments were redacted before"):
            await backend.resend(sink, sent.task_id)
        assert sink.sent == []
    else:
        await backend.resend(sink, sent.task_id)
        assert (sink.last.args, sink.last.kwargs) == ([1], {"a": "secret", "b": "b"})


def raises(*_: Any) -> Any:
    raise ValueError


@pytest.mark.parametrize(
    "options",
    [{"record_args": False}, {"max_args_bytes": 3}, {"redact": raises}],
    ids=lambda options: next(iter(options)),
)
async def test_what_was_not_recorded_is_refused(options: dict[str, Any], backend: Backend) -> None:
    broker, sink = broker_of(backend, **options), Sink()
    sent = await broker.register_task(fail, "fail").kiq("long")
    with pytest.raises(NotResendableError, match=r"were not recorded: .* record_args=True"):
        await backend.resend(sink, sent.task_id)
    assert sink.sent == []


async def test_without_the_middleware_there_is_no_name(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    with pytest.raises(NotResendableError, match="its name was not recorded"):
        await backend.resend(Sink(), task_id)


async def test_no_result_cannot_be_sent_again(backend: Backend, database: Database) -> None:
    task_id = new_id()
    with pytest.raises(ResultIsMissingError):
        await backend.resend(Sink(), task_id)
    sent = await broker_of(backend).register_task(fail, "fail").kiq()
    await database.fetch("UPDATE taskiq_results SET expires_at = now()")
    with pytest.raises(ResultIsMissingError):
        await backend.resend(Sink(), sent.task_id)


async def test_a_broker_that_cannot_send_says_so(backend: Backend) -> None:
    class Down(InMemoryBroker):
        async def kick(self, message: BrokerMessage) -> None:
            raise ConnectionRefusedError

    sent = await broker_of(backend).register_task(fail, "fail").kiq()
    with pytest.raises(SendTaskError):
        await backend.resend(Down(), sent.task_id)
    with pytest.raises(ConfigurationError, match="broker must be a taskiq broker, not 'broker'"):
        await backend.resend("broker", sent.task_id)  # type: ignore[arg-type]  # that is the point


async def test_reading_for_it_deletes_nothing(start_backend: BackendFactory) -> None:
    backend = await start_backend(keep_results=False)
    sent = await broker_of(backend).register_task(fail, "fail").kiq()
    for _ in range(2):
        await backend.resend(Sink(), sent.task_id)


async def test_a_declared_return_type_is_restored(start_backend: BackendFactory) -> None:
    backend = await start_backend(serializer=JSONSerializer())
    broker = broker_of(backend)

    @broker.task
    async def day() -> date:
        return date(2030, 1, 2)

    again = await backend.resend(broker, (await day.kiq()).task_id)
    assert (await again.wait_result(timeout=10)).return_value == date(2030, 1, 2)
