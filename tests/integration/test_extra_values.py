"""Columns of the application's own, filled by extra_values in the row that is written anyway."""

import asyncio
import contextvars
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultDecodeError,
    ResultMixin,
    StorageError,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database, eventually
from tests.integration.extra_columns import (
    VALUES,
    Application,
    each_driver,
    errors,
    open_application,
    returned,
    store,
)
from tests.integration.waiters import overheard
from tests.tasks import new_id, progress_of, result_of


@pytest.fixture
async def application(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> AsyncIterator[Application]:
    driver = getattr(request, "param", "asyncpg")
    application = await open_application(database, driver, start_backend)
    yield application
    await application.engine.dispose()


@each_driver
async def test_values_of_every_type_are_stored_alone_and_among_others(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many rows, each with its own values, and NULLs among them, in few statements."""
    rows: dict[str, Any] = {
        f"{i:03}": {
            name: value if name == "region" or i % (k + 2) else None
            for k, (name, value) in enumerate(VALUES.items())
        }
        for i in range(200)
    }
    rows["alone"] = VALUES
    backend = await application.start_with(rows)
    await store(backend, "alone")
    application.log.queries.clear()
    await store(backend, *rows)
    await asyncio.sleep(0)
    if application.engine.dialect.driver == "asyncpg":
        assert 1 <= application.log.count("INSERT") <= 20
    assert await application.stored(*VALUES) == {
        task_id: tuple({**row, "upper": row["upper"] and "ABC"}.values())
        for task_id, row in rows.items()
    }
    assert await returned(backend, "alone", "007") == ["alone", "007"]
    assert errors(caplog) == []


@each_driver
async def test_a_column_without_a_key_gets_its_default_and_is_left_alone_later(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where others of the batch fill it; None is NULL."""
    values: dict[str, dict[str, Any]] = {
        "all": {"tenant": "acme", "region": "north", "tags": ["x"], "count": 1},
        "none": {},
        "tenant": {"tenant": "acme"},
        "region": {"region": "north"},
    }
    expected: dict[str, list[Any]] = {
        "all": ["acme", "north", ["x"], 1],
        "none": [None, "nowhere", None, None],
        "tenant": ["acme", "nowhere", None, None],
        "region": [None, "north", None, None],
    }
    backend = await application.start_with(values)
    await store(backend, *values)
    names = ("tenant", "region", "tags", "count")
    assert await application.stored(*names) == {t: tuple(row) for t, row in expected.items()}
    values.update(
        {"all": {"tenant": None}, "none": {"count": 5}, "tenant": {}, "region": {"tags": []}}
    )
    expected["all"][0], expected["none"][3], expected["region"][2] = None, 5, []
    await store(backend, *values)
    assert await application.stored(*names) == {t: tuple(row) for t, row in expected.items()}
    assert errors(caplog) == []


async def test_their_results_are_told_to_those_who_wait_once_they_are_stored(
    application: Application, database: Database
) -> None:
    backend = await application.start(lambda *_: {"count": 1}, notify=True)
    task_id, unwanted = new_id(), new_id()  # the channel is that of all tests
    await database.fetch(f"ALTER TABLE taskiq_results ADD CHECK (task_id <> '{unwanted}')")
    async with overheard(database, "taskiq_sa_pg.taskiq_results") as heard:

        async def is_told() -> bool:
            return any(task_id in payload for _, payload in heard)

        with pytest.raises(StorageError):
            await store(backend, unwanted)
        await store(backend, task_id)
        await eventually(is_told)
    assert not any(unwanted in payload for _, payload in heard)


async def test_what_the_application_filled_in_later_survives_an_overwrite(
    application: Application,
) -> None:
    """Whether there is no function, one that fills nothing, or one that fills something else."""
    result: Any = application.models.Result
    progress: Any = application.models.Progress
    kept = ("acme", "south", ["kept"])
    for attempt, function in enumerate((None, lambda *_: {}, lambda *_: {"count": 3})):
        backend = await application.start(function)
        await store(backend, *"ab", labels={"_retries": 2 * attempt})
        await asyncio.gather(*[backend.set_progress(i, progress_of(1)) for i in "ab"])
        await application.execute(
            sa.update(result).values(tenant="acme", region="south", tags=["kept"]),
            sa.update(progress).values(stage="late"),
        )
        await store(backend, *"ab", labels={"_retries": 2 * attempt})
        await store(backend, "a", labels={"_retries": 2 * attempt + 1})
        await asyncio.gather(*[backend.set_progress(i, progress_of(2)) for i in "ab"])
        assert await application.stored("tenant", "region", "tags") == {"a": kept, "b": kept}
        assert await application.stored("attempt") == {"a": 2 * attempt + 1, "b": 2 * attempt}
        async with AsyncSession(application.engine) as session:
            assert (await session.scalars(sa.select(progress.stage))).all() == ["late", "late"]


async def test_an_earlier_attempt_overwrites_no_value_of_a_later_one(
    application: Application,
) -> None:
    backend = await application.start(lambda _, result: {"count": result.labels["_retries"]})
    for attempt in (2, 1):
        await store(backend, *"ab", labels={"_retries": attempt})
        await store(backend, "c", labels={"_retries": attempt})
    assert set((await application.stored("count")).values()) == {2}


async def test_the_function_runs_in_the_callers_context_once_for_each_call(
    application: Application,
) -> None:
    tenant = contextvars.ContextVar[str]("tenant")
    calls = []

    def values(task_id: str, result: Any) -> dict[str, Any]:
        calls.append((task_id, result.return_value, asyncio.current_task()))
        return {"tenant": tenant.get()}

    backend = await application.start(values)

    async def store_for(name: str, task_id: str) -> None:
        tenant.set(name)
        await backend.set_result(task_id, result_of(name))

    callers = [
        asyncio.create_task(store_for(name, task_id))
        for task_id, name in zip("abcd", ["acme", "other"] * 2, strict=True)
    ]
    await asyncio.gather(*callers)
    assert await application.stored("tenant") == dict(
        zip("abcd", ["acme", "other"] * 2, strict=True)
    )
    assert calls == [
        (task_id, name, caller)
        for task_id, name, caller in zip("abcd", ["acme", "other"] * 2, callers, strict=True)
    ]


async def test_the_last_of_two_writes_at_once_is_stored_with_its_own_values(
    application: Application,
) -> None:
    backend = await application.start(lambda _, result: {"count": result.return_value})
    await asyncio.gather(
        backend.set_result("busy", result_of(0)),
        *[backend.set_result(i, result_of(n)) for n in range(1, 4) for i in "ab"],
    )
    assert await application.stored("count") == {"busy": 0, "a": 3, "b": 3}
    assert await returned(backend, *"ab") == [3, 3]


async def test_results_that_are_read_once_come_with_their_values_and_go_with_them(
    application: Application,
) -> None:
    values = {"a": {"count": 1}, "b": {"tags": ["x"]}, "c": {}}
    backend = await application.start_with(values)
    taking = await application.start(lambda *_: {}, keep_results=False)
    await store(backend, *values)
    assert await returned(taking, *"abc") == [*"abc"]
    assert await application.stored("count") == {}


async def test_a_python_function_as_a_columns_default_is_called_for_every_row(
    database: Database, start_backend: BackendFactory
) -> None:
    """With and without extra_values, and for progress."""

    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        public_id: Mapped[uuid.UUID] = mapped_column(default=uuid.uuid4)
        tenant: Mapped[str | None]

    class Progress(ProgressMixin, Base):
        public_id: Mapped[uuid.UUID] = mapped_column(default=uuid.uuid4)

    models = Models(Result, Progress)
    engine = make_engine(database.dsn)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    options = {"engine": engine, "models": models, "run_migrations": False, "notify": False}
    plain = await start_backend(**options)
    extended = await start_backend(**options, extra_values=lambda *_: {"tenant": "acme"})
    ids = [str(i) for i in range(10)]
    await store(plain, *ids)
    await store(extended, *[f"e{i}" for i in ids])
    await asyncio.gather(*[plain.set_progress(i, progress_of(1)) for i in ids])
    for table, count in (("taskiq_results", 20), ("taskiq_results_progress", 10)):
        query = f"SELECT task_id, public_id FROM {table} ORDER BY 1"
        before = await database.fetch(query)
        assert len({row["public_id"] for row in before}) == count
        await store(plain, *ids)
        assert await database.fetch(query) == before
    await engine.dispose()


async def take_for_nobody(application: Application, backend: Any) -> None:
    """Reads the result of `task`, for a reader who goes away in the COMMIT."""
    reading: list[asyncio.Task[Any]] = []

    @sa.event.listens_for(application.engine.sync_engine, "commit")
    def cancel(_connection: Any) -> None:
        for task in reading:
            task.cancel()

    async def stored_by() -> Any:
        async with application.engine.connect() as connection:
            return (await connection.execute(sa.text("SELECT xmin FROM taskiq_results"))).scalar()

    first = await stored_by()
    reading.append(asyncio.create_task(backend.get_result("task")))
    await asyncio.wait(reading)
    assert reading.pop().cancelled()

    async def is_another() -> bool:
        return await stored_by() not in {None, first}

    await eventually(is_another)  # the COMMIT that deletes it may still be under way


@each_driver
async def test_values_of_every_type_go_back_with_a_result_that_was_taken_for_nobody(
    application: Application,
) -> None:
    backend = await application.start(lambda *_: VALUES, keep_results=False)
    await store(backend, "task")
    await backend.set_progress("task", progress_of(None))
    names = [*VALUES, "size"]
    before = await application.stored(*names)
    await take_for_nobody(application, backend)

    async def is_back() -> bool:
        return await application.stored(*names) == before

    await eventually(is_back)
    assert (await backend.get_result("task")).return_value == "task"


@each_driver
async def test_a_value_that_a_type_of_your_own_cannot_read_holds_up_no_other_result(
    application: Application,
) -> None:
    backend = await application.start(lambda *_: VALUES, keep_results=False)
    await store(backend, "good", "bad", "other")
    await application.execute(
        "ALTER TABLE taskiq_results ALTER colour TYPE TEXT USING colour::text",
        "UPDATE taskiq_results SET colour = 'PURPLE' WHERE task_id = 'bad'",
    )
    outcomes = await asyncio.gather(
        *[backend.get_result(i) for i in ("good", "bad", "other")], return_exceptions=True
    )
    assert [getattr(o, "return_value", type(o)) for o in outcomes] == [
        "good",
        ResultDecodeError,
        "other",
    ]
    await store(backend, "another")
    with pytest.raises(ResultDecodeError):
        await backend.get_results(["bad", "another"])
    assert await backend.is_result_ready("bad")
    assert await backend.is_result_ready("another")


async def test_json_of_your_own_goes_back_to_the_letter(
    application: Application,
) -> None:
    backend = await application.start(lambda *_: {}, keep_results=False)
    await store(backend, "task")
    odd = '{"b" :1,  "a":[]}'
    await application.execute(f"UPDATE taskiq_results SET plain_json = '{odd}'".replace(":", "\\:"))
    query = "SELECT CAST(plain_json AS TEXT) FROM taskiq_results"
    await take_for_nobody(application, backend)

    async def is_back() -> bool:
        async with application.engine.connect() as connection:
            return (await connection.execute(sa.text(query))).scalars().all() == [odd]

    await eventually(is_back)
