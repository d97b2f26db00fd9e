"""forget(): deletes results and progress, unread and unannounced."""

import asyncio
import random
from typing import Any

import pytest
import sqlalchemy as sa
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg import (
    InvalidTaskIdError,
    NotStartedError,
    ResultIsMissingError,
    SQLAlchemyResultBackend,
)
from tests.conftest import (
    BackendFactory,
    Database,
    assert_comes_to_rest,
    engine_of,
    eventually,
)
from tests.integration.databases import Log
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]


async def store(backend: Backend, *task_ids: str) -> None:
    await asyncio.gather(
        *[backend.set_result(i, result_of(i)) for i in task_ids],
        *[backend.set_progress(i, progress_of(i)) for i in task_ids],
    )


async def ids_in(database: Database, table: str = "taskiq_results") -> set[str]:
    rows = await database.fetch(f"SELECT task_id::text FROM {table}")
    return {row["task_id"].replace("-", "") for row in rows}


@pytest.mark.parametrize(
    ("kind", "keep_results"), [("VarChar", True), ("Text", False), ("Uuid", True)]
)
async def test_results_go_with_their_progress(
    dsn: str, database: Database, start_backend: BackendFactory, kind: str, keep_results: bool
) -> None:
    backend: Backend = await start_backend(dsn, field_for_task_id=kind, keep_results=keep_results)
    kept, gone, running = new_id(), [new_id() for _ in range(5)], new_id()
    await store(backend, kept, *gone)
    await backend.set_progress(running, progress_of(1))
    assert await backend.forget([*gone, gone[0], running, new_id()]) == 5
    assert await ids_in(database) == await ids_in(database, "taskiq_results_progress") == {kept}
    with pytest.raises(ResultIsMissingError):
        await backend.get_result(gone[0])
    assert await backend.get_progress(gone[0]) is None
    assert await backend.forget(gone) == await backend.forget([]) == 0


async def test_any_number_goes_in_slices(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    ids = [f"täsk %s {n}" for n in range(450)]
    await store(backend, *ids)
    random.shuffle(ids)
    assert await backend.forget(iter(ids[1:])) == 449
    assert await ids_in(database) == {ids[0]}


async def test_what_cannot_be_read_back_or_has_expired_goes_too(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await store(backend, "bad", "expired")
    await database.fetch("UPDATE taskiq_results SET return_value = 'garbage'")
    await database.fetch(
        "UPDATE taskiq_results SET expires_at = now() - interval '1 day' WHERE task_id = 'expired'"
    )
    assert await backend.forget(["bad", "expired"]) == 2


async def test_another_spelling_of_a_uuid_is_the_same_task(start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend(field_for_task_id="Uuid")
    await store(backend, "a0eebc999c0b4ef8bb6d6bb9bd380a11")
    both = ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc999c0b4ef8bb6d6bb9bd380a11"]
    assert await backend.forget(both) == 1


async def test_one_str_is_refused(start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend()
    await store(backend, "a")
    with pytest.raises(TypeError, match=r"forget\(\) takes several tasks, not one str: 'a'"):
        await backend.forget("a")
    assert await backend.is_result_ready("a")


async def test_an_id_that_cannot_be_deletes_nothing(start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend()
    await store(backend, "a")
    with pytest.raises(InvalidTaskIdError):
        await backend.forget(["a", "\x00"])
    assert await backend.is_result_ready("a")


async def test_it_needs_a_started_backend(database: Database) -> None:
    with pytest.raises(NotStartedError):
        await Backend(database.dsn).forget(["a"])


@pytest.mark.parametrize("notify", [True, False])
async def test_waiters_and_pollers_see_a_task_without_a_result(
    start_backend: BackendFactory, notify: bool
) -> None:
    backend: Backend = await start_backend(notify=notify)
    other: Backend = await start_backend(notify=notify)
    await store(backend, "a")
    assert await backend.is_result_ready("a")
    assert await other.forget(["a"]) == 1
    assert not await backend.is_result_ready("a")
    with pytest.raises(TaskiqResultTimeoutError):
        await backend.wait_result("a", timeout=0.05)
    waiting = asyncio.ensure_future(backend.wait_result("a", timeout=30))
    await other.set_result("a", result_of("again"))
    assert (await waiting).return_value == "again"


async def test_statements_that_deadlock_are_tried_again(
    dsn: str, start_backend: BackendFactory
) -> None:
    """Overlapping ids in all orders: written, taken and forgotten at once."""
    backends: list[Backend] = [await start_backend(dsn, keep_results=False) for _ in range(3)]
    ids = [f"{n}" for n in range(120)]

    async def write(backend: Backend) -> None:
        await store(backend, *random.sample(ids, 100))

    async def take(backend: Backend) -> None:
        await backend.get_results(random.sample(ids, 100))

    async def forget(backend: Backend) -> None:
        await backend.forget(random.sample(ids, 100))

    for _ in range(6):
        await asyncio.gather(
            *[do(backend) for backend in backends for do in (write, take, forget, forget)]
        )
    for backend in backends:
        await assert_comes_to_rest(backend)


async def test_results_are_locked_before_progress(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    """As the others do it: else the two could wait for each other."""
    backend: Backend = await start_backend(dsn)
    await store(backend, "a")
    async with engine_of(backend).connect() as connection:
        await connection.execute(sa.text("SELECT FROM taskiq_results FOR UPDATE"))
        forgetting = asyncio.ensure_future(backend.forget(["a"]))

        async def is_waiting() -> bool:
            rows = await database.fetch(
                "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                "AND application_name = 'ours'"
            )
            return len(rows) == 1

        await eventually(is_waiting)
        await database.fetch("SELECT FROM taskiq_results_progress FOR UPDATE NOWAIT")
    assert await forgetting == 1


async def test_it_is_one_statement(
    database: Database, start_backend: BackendFactory, log: Log
) -> None:
    backend: Backend = await start_backend(
        database.dsn, notify=False, max_connections=1, pool_events=[(log.attach, "connect")]
    )
    assert await backend.forget(["a", "b"]) == 0  # for which asyncpg asks about types
    await store(backend, "a", "b")
    await asyncio.sleep(0)
    log.queries.clear()
    assert await backend.forget(["a", "b"]) == 2
    await asyncio.sleep(0)
    assert len(log.queries) == 1
