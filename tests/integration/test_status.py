"""Statuses as they are set, read and deleted: what tasks are at before their results."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped

from taskiq_sa_pg import (
    ConfigurationError,
    Models,
    ProgressMixin,
    ResultMixin,
    SQLAlchemyResultBackend,
    StatusMixin,
    TaskStatus,
    build_models,
)
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.statements import select_lost, select_statuses
from tests.conftest import BackendFactory, Database
from tests.tasks import new_id, result_of
from tests.unit.sql import compiled

Backend = SQLAlchemyResultBackend[Any]

MINUTE = timedelta(minutes=1)
AT = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture
async def backend(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> Backend:
    driver, field = getattr(request, "param", "asyncpg-VarChar").split("-")
    started: Backend = await start_backend(
        database.dsn_of(driver), field_for_task_id=field, track="started"
    )
    return started


each_kind = pytest.mark.parametrize("backend", ["asyncpg-VarChar", "psycopg-Uuid"], indirect=True)


async def state_of(backend: Backend, task_id: str) -> str:
    return (await backend.get_status(task_id)).state


async def rows_of_status(database: Database) -> int:
    [row] = await database.fetch("SELECT count(*) FROM taskiq_results_status")
    count: int = row["count"]
    return count


async def running(backend: Backend) -> list[str]:
    return [UUID(status.task_id).hex for status in await backend.get_running()]


@each_kind
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


@each_kind
async def test_a_later_attempt_and_execution_stays(backend: Backend) -> None:
    task_id, other_id = new_id(), new_id()

    async def after(state: Any, attempt: int, started_at: datetime | None) -> tuple[Any, ...]:
        await backend.set_status(TaskStatus(task_id, state, None, attempt, None, started_at))
        # Beside another: several rows have a statement of their own.
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


@each_kind
async def test_what_was_queued_later_counts_where_a_task_id_is_used_again(
    backend: Backend,
) -> None:
    task_id = new_id()

    async def after(state: Any, attempt: int, queued_at: datetime | None) -> tuple[Any, ...]:
        await backend.set_status(TaskStatus(task_id, state, None, attempt, queued_at))
        found = await backend.get_status(task_id)
        return found.state, found.attempt, found.queued_at

    assert await after("retrying", 1, AT) == ("retrying", 1, AT)
    assert await after("queued", 0, None) == ("retrying", 1, AT)
    assert await after("queued", 0, AT + MINUTE) == ("queued", 0, AT + MINUTE)
    assert await after("started", 0, AT) == ("queued", 0, AT + MINUTE)
    assert await after("unknown", 1, AT) == ("queued", 0, AT + MINUTE)
    assert await after("unknown", 0, AT + MINUTE) == ("unknown", 0, None)


async def test_of_calls_at_once_the_latest_attempt_counts(backend: Backend) -> None:
    task_id = new_id()
    await asyncio.gather(
        *[
            backend.set_status(TaskStatus(task_id, "started", attempt=attempt))
            for attempt in (0, 3, 1, 2)
        ]
    )
    assert (await backend.get_status(task_id)).attempt == 3


@each_kind
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


@each_kind
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


@each_kind
async def test_what_is_forgotten_takes_its_status_along(
    backend: Backend, database: Database
) -> None:
    ids = [new_id() for _ in range(3)]
    for task_id in ids:
        await backend.set_status(TaskStatus(task_id, "started"))
    assert await backend.forget(ids[:2]) == 0
    assert await running(backend) == ids[2:]
    assert await rows_of_status(database) == 1


async def test_without_a_status_table_results_tell(
    database: Database, start_backend: BackendFactory
) -> None:
    await start_backend()  # makes the tables
    await database.fetch("DROP TABLE taskiq_results_status")
    models = build_models()
    backend = await start_backend(
        models=Models(models.Result, models.Progress), run_migrations=False
    )
    await backend.set_result("1", result_of(1))
    assert await state_of(backend, "1") == "succeeded"
    assert await state_of(backend, "2") == "unknown"
    assert await backend.get_running() == []
    assert (await backend.prune()).is_complete
    assert await backend.forget(["1"]) == 1


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


@each_kind
async def test_the_longest_running_come_first_and_not_too_many(backend: Backend) -> None:
    ids = [new_id() for _ in range(5)]
    for i, task_id in enumerate(ids):
        await backend.set_status(TaskStatus(task_id, "started", started_at=AT - i * MINUTE))
    assert await running(backend) == ids[::-1]
    assert len(await backend.get_running(2**40)) == len(ids)
    first: Sequence[TaskStatus] = await backend.get_running(2)
    assert [UUID(status.task_id).hex for status in first] == [ids[4], ids[3]]
    with pytest.raises(ConfigurationError, match="limit must be a whole number of 1 or more"):
        await backend.get_running(0)


async def test_only_what_no_result_says_can_be_set(backend: Backend) -> None:
    for state in ("succeeded", "failed", "expired", "odd"):
        with pytest.raises(ConfigurationError, match="only stored results have the others"):
            await backend.set_status(TaskStatus(new_id(), state))  # type: ignore[arg-type]  # that is the point


def test_arguments_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match='track must be "started" or None'):
        SQLAlchemyResultBackend("postgresql://", track="everything")  # type: ignore[arg-type]  # that is the point
    models = build_models()
    with pytest.raises(ConfigurationError, match="track needs a status table"):
        SQLAlchemyResultBackend(
            "postgresql://", track="started", models=Models(models.Result, models.Progress)
        )


async def test_statuses_and_lost_tasks_are_looked_up_by_index(
    backend: Backend, database: Database
) -> None:
    """Of 10,000 tasks in each table, the queue among them."""
    models = build_models(queue=True)
    assert models.status_table is not None
    assert models.workers_table is not None
    engine = make_engine(database.direct_dsn)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    await engine.dispose()
    for insert in (
        "taskiq_results (task_id, is_err, return_value, execution_time, labels) "
        "SELECT n::text, false, '', 0, '{}'",
        "taskiq_results_status (task_id, state, worker, updated_at) "
        "SELECT n::text, 'started', 'gone', now() - interval '1 h'",
        "taskiq_results_queue (task_id, task_name, message) SELECT n::text, '', ''",
    ):
        await database.fetch(f"INSERT INTO {insert} FROM generate_series(1, 10000) n")
    await database.fetch("ANALYZE")
    asked = {
        select_statuses(models): [str(n) for n in range(0, 20_000, 100)],
        select_lost(models, models.status_table, models.workers_table): 100,
    }
    read: list[str] = []
    for statement, argument in asked.items():
        rows = await database.fetch(f"EXPLAIN {compiled(statement)}", argument)
        read += [row[0].split(" on ")[1].split()[0] for row in rows if "Seq Scan on" in row[0]]
    # The few workers; and all that were started, of which no index knows.
    assert set(read) == {"taskiq_results_workers", "taskiq_results_status"}
    assert read.count("taskiq_results_status") == 1
