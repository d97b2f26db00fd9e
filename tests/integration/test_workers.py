"""The worker processes: who is there, who is gone, and which tasks are lost with them."""

from dataclasses import replace
from typing import Any

import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend, TaskStatus, WorkerInfo
from tests.conftest import BackendFactory, Database
from tests.integration.test_status import state_of
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]


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


async def store_worker(database: Database, name: str, seen: int = 0, started: int = 3600) -> None:
    """The row of a worker that was seen and started so many seconds ago."""
    await database.fetch(
        "INSERT INTO taskiq_results_workers (worker, seen_at, started_at) VALUES "
        f"('{name}', now() - interval '{seen} s', now() - interval '{started} s') "
        "ON CONFLICT (worker) DO UPDATE SET seen_at = excluded.seen_at"
    )


async def age_statuses(database: Database, seconds: int, worker: str = "%") -> None:
    await database.fetch(
        f"UPDATE taskiq_results_status SET updated_at = updated_at - interval '{seconds} s' "
        f"WHERE coalesce(worker, '') LIKE '{worker}'"
    )


async def start_task(backend: Backend, worker: str | None) -> str:
    task_id = new_id()
    await backend.set_status(TaskStatus(task_id, "started", "task", worker=worker))
    return task_id


async def states_of(backend: Backend, task_id: str) -> set[str]:
    """What both ways to ask say, which have to agree."""
    listed = {each.task_id.replace("-", ""): each.state for each in await backend.get_running()}
    return {await state_of(backend, task_id), listed[task_id]}


@each_kind
async def test_workers_are_listed_with_what_they_execute(
    backend: Backend, database: Database
) -> None:
    assert await backend.get_workers() == []
    await store_worker(database, "gone", seen=61)
    await store_worker(database, "here")
    for worker in ("here", "here", "gone", None, "another"):
        task_id = await start_task(backend, worker)
    await backend.set_result(await start_task(backend, "here"), result_of(1))
    found = await backend.get_workers()
    assert [(each.worker, each.is_alive, each.running) for each in found] == [
        ("gone", False, 1),
        ("here", True, 2),
    ]
    here: WorkerInfo = found[1]
    assert (here.seen_at - here.started_at).total_seconds() == 3600
    assert here.seen_at.utcoffset() == here.started_at.utcoffset()
    assert task_id


@each_kind
async def test_a_task_is_lost_with_its_worker_and_started_again_by_the_next(
    backend: Backend, database: Database
) -> None:
    task_id = await start_task(backend, "first")
    assert await states_of(backend, task_id) == {"started"}
    await store_worker(database, "first", seen=59)
    await age_statuses(database, 600)
    assert await states_of(backend, task_id) == {"started"}
    await store_worker(database, "first", seen=61)
    assert await states_of(backend, task_id) == {"lost"}
    await store_worker(database, "first")
    assert await states_of(backend, task_id) == {"started"}
    await database.fetch("DELETE FROM taskiq_results_workers")
    assert await states_of(backend, task_id) == {"lost"}
    await backend.set_status(TaskStatus(task_id, "started", worker="second"))
    status = await backend.get_status(task_id)
    assert (status.state, status.worker) == ("started", "second")
    await age_statuses(database, 61)
    assert await states_of(backend, task_id) == {"lost"}
    await backend.set_result(task_id, result_of(1))
    assert await state_of(backend, task_id) == "succeeded"


async def test_what_an_earlier_process_of_the_same_name_has_started_is_lost(
    backend: Backend, database: Database
) -> None:
    """As after a container was killed and has started again, with the same host name and pid."""
    await store_worker(database, "host:1", started=10)
    task_id = await start_task(backend, "host:1")
    assert await states_of(backend, task_id) == {"started"}
    await age_statuses(database, 11)
    assert await states_of(backend, task_id) == {"lost"}
    assert [each.running for each in await backend.get_workers()] == [0]


async def test_only_started_tasks_of_known_workers_are_lost(
    backend: Backend, database: Database
) -> None:
    nobody = await start_task(backend, None)
    queued = new_id()
    await backend.set_status(TaskStatus(queued, "retrying", worker="gone"))
    await age_statuses(database, 3600)
    assert await states_of(backend, nobody) == {"started"}
    assert await state_of(backend, queued) == "retrying"


async def test_workers_are_listed_where_the_models_have_no_statuses(
    backend: Backend, database: Database, start_backend: BackendFactory
) -> None:
    await store_worker(database, "here")
    models = replace(backend.models, Status=None)
    other = await start_backend(models=models)
    assert [(each.worker, each.running) for each in await other.get_workers()] == [("here", 0)]
