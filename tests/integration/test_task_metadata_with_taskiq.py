"""TaskMetadataMiddleware beside taskiq's own middlewares, and beside itself."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped
from taskiq import InMemoryBroker, SimpleRetryMiddleware, SmartRetryMiddleware, TaskiqMiddleware

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultMixin,
    SchemaError,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database
from tests.integration.databases import Log

Backend = SQLAlchemyResultBackend[Any]


@pytest.fixture
async def backend(start_backend: BackendFactory) -> Backend:
    started: Backend = await start_backend()
    return started


async def rows_of(database: Database, *task_ids: str, table: str = "taskiq_results") -> list[Any]:
    found = await database.fetch(f"SELECT * FROM {table} WHERE task_id = ANY($1)", list(task_ids))
    rows = {row["task_id"]: dict(row) for row in found}
    return [rows[task_id] for task_id in task_ids]


@pytest.mark.parametrize("keeps_failures", [False, True])
@pytest.mark.parametrize("is_first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("retries", [SimpleRetryMiddleware, SmartRetryMiddleware])
async def test_the_row_is_of_the_last_attempt(
    retries: Callable[..., TaskiqMiddleware],
    is_first: bool,
    keeps_failures: bool,
    backend: Backend,
    database: Database,
) -> None:
    middlewares = [
        TaskMetadataMiddleware(record_args=True),
        retries(no_result_on_retry=not keeps_failures, default_retry_count=5),
    ]
    broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
    broker.add_middlewares(*(middlewares if is_first else reversed(middlewares)))
    started: list[datetime] = []

    @broker.task(task_name="flaky", retry_on_error=True, delay=0.001)
    async def flaky(fails: int) -> int:
        started.append(datetime.now().astimezone())
        if len(started) <= fails:
            raise ValueError(len(started))
        return fails

    sent = await flaky.kiq(2)
    result = await backend.wait_result(sent, timeout=30)
    while result.is_err:  # of an earlier attempt
        result = await backend.wait_result(sent, timeout=30)
    await broker.wait_all()
    [row] = await rows_of(database, sent.task_id)
    assert (result.return_value, row["attempt"], row["args"]) == (2, 2, "[2]")
    assert started[1] <= row["queued_at"] <= row["started_at"] <= started[2]


async def test_two_brokers_in_one_process_never_mix(
    database: Database, start_backend: BackendFactory
) -> None:
    sent: dict[str, list[str]] = {}
    brokers = []
    for name in ("one", "two"):
        backend = await start_backend(table_name=name)
        broker = InMemoryBroker().with_result_backend(backend)
        broker.add_middlewares(TaskMetadataMiddleware(record_args=True, worker=name))
        broker.register_task(echo, task_name=f"echo {name}")
        brokers.append((name, broker))
    for name, broker in brokers:
        task = broker.find_task(f"echo {name}")
        assert task is not None
        kicked = await asyncio.gather(*[task.kiq(name, number) for number in range(20)])
        sent[name] = [each.task_id for each in kicked]
    for name, broker in brokers:
        await broker.wait_all()
        rows = await rows_of(database, *sent[name], table=name)
        assert {row["worker"] for row in rows} == {name}
        assert {row["task_name"] for row in rows} == {f"echo {name}"}
        assert [row["args"] for row in rows] == [f'["{name}", {number}]' for number in range(20)]


async def echo(*args: Any) -> Any:
    return args


@pytest.mark.parametrize("await_inplace", [True, False])
async def test_tasks_may_be_executed_in_place(
    await_inplace: bool, backend: Backend, database: Database
) -> None:
    broker = InMemoryBroker(await_inplace=await_inplace).with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware())
    task = broker.register_task(echo, task_name="echo")
    sent = await task.kiq(1)
    await broker.wait_all()
    [row] = await rows_of(database, sent.task_id)
    assert row["task_name"] == "echo"
    assert timedelta(0) <= row["started_at"] - row["queued_at"] < timedelta(minutes=1)


async def test_a_redaction_that_is_cancelled_cancels_the_task_and_says_nothing(
    backend: Backend, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    is_redacting = asyncio.Event()

    async def redact(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        is_redacting.set()
        await asyncio.Event().wait()

    broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(record_args=True, redact=redact))
    task = broker.register_task(echo, task_name="echo")
    sending = asyncio.create_task(task.kiq("geheim"))
    await is_redacting.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert await database.fetch("SELECT 1 FROM taskiq_results") == []
    assert "geheim" not in caplog.text


async def test_columns_of_your_own_cost_no_further_statement(
    database: Database, start_backend: BackendFactory
) -> None:
    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        tenant: Mapped[str | None]

    class Progress(ProgressMixin, Base): ...

    models = await create_all(database, Models(Result, Progress))
    log = Log()
    backend = await start_backend(
        models=models,
        run_migrations=False,
        notify=False,
        pool_events=[(log.attach, "connect")],
        extra_values=lambda *_: {"tenant": "us"},
    )
    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(record_args=True))
    task = broker.register_task(echo, task_name="echo")
    await (await task.kiq()).wait_result()
    log.queries.clear()
    sent = await asyncio.gather(*[task.kiq(number) for number in range(100)])
    await broker.wait_all()
    rows = await rows_of(database, *[each.task_id for each in sent])
    assert {(row["tenant"], row["task_name"]) for row in rows} == {("us", "echo")}
    assert [row["args"] for row in rows] == [f"[{number}]" for number in range(100)]
    assert len(log.queries) < 20


async def test_an_annotation_alone_makes_no_column_of_your_own(
    database: Database, start_backend: BackendFactory
) -> None:
    """SQLAlchemy takes the mixin's; a table that has another is refused."""

    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        worker: Mapped[int]  # type: ignore[assignment]  # that is the point

    class Progress(ProgressMixin, Base): ...

    models = await create_all(database, Models(Result, Progress))
    backend = await start_backend(models=models, run_migrations=False)
    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(worker="us"))
    sent = await broker.register_task(echo, task_name="echo").kiq(1)
    await broker.wait_all()
    [row] = await rows_of(database, sent.task_id)
    assert row["worker"] == "us"
    await database.fetch("ALTER TABLE taskiq_results ALTER worker TYPE integer USING 7")
    with pytest.raises(SchemaError, match="worker is integer and must be text"):
        await start_backend(models=models, run_migrations=False)


async def create_all(database: Database, models: Models) -> Models:
    engine = make_engine(database.dsn)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    await engine.dispose()
    return models


class Unspeakable:
    """Nothing can be made of it."""

    def __repr__(self) -> str:
        raise RuntimeError("geheim")


@pytest.mark.parametrize(
    "odd",
    [
        {1: "a", None: "b"},
        float("nan"),
        10**400,
        b"\xff\x00",
        "\ud800",
        {"deep": [{"er": ("tuple", {1})}]},
        Unspeakable(),
        "x" * 1_000_000,
    ],
    ids=["keys", "nan", "huge", "bytes", "surrogate", "deep", "unspeakable", "long"],
)
async def test_whatever_the_arguments_are_the_result_is_stored(
    odd: Any, backend: Backend, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Some are made by another middleware, which no queue has carried."""

    class Spoil(TaskiqMiddleware):
        def pre_execute(self, message: Any) -> Any:
            message.args = [odd]
            message.kwargs = {"odd": odd}
            return message

    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(Spoil(), TaskMetadataMiddleware(record_args=True))

    @broker.task(task_name="n" * 1_000_000)
    async def nothing(*_: Any, **__: Any) -> int:
        return 42

    sent = await nothing.kiq()
    result = await backend.wait_result(sent, timeout=30)
    assert result.return_value == 42
    [row] = await rows_of(database, sent.task_id)
    assert row["task_name"] == "n" * 1_000_000
    assert row["started_at"] is not None
    assert "geheim" not in caplog.text
