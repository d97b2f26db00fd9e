"""What can be done with results, statuses and workers: each operation at a place of its own ids."""

import asyncio
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import TaskiqResult

from taskiq_sa_pg import (
    ResultIsMissingError,
    StorageError,
    TaskAbandonedError,
    TaskStatus,
)
from tests.citus.places import Backend, Place
from tests.conftest import eventually
from tests.integration.brokers import SOON
from tests.integration.test_beats import worker_of
from tests.tasks import progress_of, result_of

# More than go into one INSERT with VALUES, and more than one statement reads.
MANY = 250

ONE = "SELECT FROM taskiq_results WHERE task_id::text = $1"


async def store(backend: Backend, task_ids: list[str], **fields: Any) -> None:
    """Each task's id is its return value."""
    await asyncio.gather(*[backend.set_result(i, result_of(i, **fields)) for i in task_ids])


async def age(place: Place, table: str, column: str, seconds: int, task_ids: list[str]) -> None:
    """As if so much time had passed since then."""
    await place.tables.fetch(
        f"UPDATE {table} SET {column} = now() - interval '{seconds} s' "
        f"WHERE task_id::text = ANY ($1)",
        task_ids,
    )


async def results_are_stored_and_read(place: Place) -> None:
    backend = await place.backend()
    alone, *others = place.new_ids(MANY)
    with pytest.raises(ResultIsMissingError):
        await backend.get_result(alone)
    assert not await backend.is_result_ready(alone)
    await store(backend, [alone])
    assert await backend.is_result_ready(alone)
    await store(backend, others)
    asked = await asyncio.gather(*[backend.is_result_ready(i) for i in others])
    assert all(asked)
    read = await asyncio.gather(*[backend.get_result(i) for i in others])
    assert [result.return_value for result in read] == others
    results = await backend.get_results([alone, *others, *place.new_ids()])
    assert {i: result.return_value for i, result in results.items()} == {
        i: i for i in (alone, *others)
    }
    await backend.set_result(alone, result_of(2, labels={"_retries": 1}))
    await backend.set_result(alone, result_of(1))
    read_as: TaskiqResult[float] = await backend.get_result(alone, return_type=float)
    assert read_as.return_value == 2.0
    failure = result_of(None, is_err=True, error=ValueError("no"))
    await backend.set_result(alone, failure.model_copy(update={"labels": {"_retries": 2}}))
    assert isinstance((await backend.get_result(alone)).error, ValueError)
    assert backend.stats()


async def results_are_waited_for(place: Place) -> None:
    backend, storing = await place.backend(), await place.backend()
    task_ids = place.new_ids(20)

    async def completed() -> list[str]:
        return [i async for i, _ in backend.as_completed(task_ids, timeout=SOON)]

    one = asyncio.create_task(backend.wait_result(task_ids[0], timeout=SOON))
    several = asyncio.create_task(backend.wait_results(task_ids, timeout=SOON))
    each = asyncio.create_task(completed())

    async def is_waiting() -> bool:
        return backend.runtime.waiters.waiting > 0

    await eventually(is_waiting)
    await store(storing, task_ids)
    assert (await one).return_value == task_ids[0]
    assert [result.return_value for result in await several] == task_ids
    assert sorted(await each) == sorted(task_ids)


async def progress_is_stored_and_watched(place: Place) -> None:
    backend = await place.backend()
    task_ids = place.new_ids(MANY)
    assert await backend.get_progress(task_ids[0]) is None
    for number in range(2):
        await asyncio.gather(*[backend.set_progress(i, progress_of(number)) for i in task_ids])
    read = await asyncio.gather(*[backend.get_progress(i) for i in task_ids])
    assert {progress.meta for progress in read if progress} == {1}
    seen = []
    async for progress in backend.watch_progress(task_ids[0], timeout=SOON):
        seen.append(progress.meta)
        if len(seen) < 3:
            await backend.set_progress(task_ids[0], progress_of(len(seen) + 1))
        else:
            await store(backend, task_ids[:1])
    assert seen == [1, 2, 3]


async def statuses_are_stored_and_read(place: Place) -> None:
    backend = await place.backend(track="started")
    queued, started, failed, *others = task_ids = place.new_ids(MANY)
    await asyncio.gather(*[backend.set_status(TaskStatus(i, "queued")) for i in task_ids])
    worker = place.new_ids()[0]
    for task_id in (started, failed, *others):
        await backend.set_status(TaskStatus(task_id, "started", "task", worker=worker))
    await backend.set_result(failed, result_of(None, is_err=True, error=ValueError()))
    await backend.set_status(TaskStatus(others[0], "unknown"))
    await asyncio.gather(*[backend.set_status(TaskStatus(i, "unknown")) for i in others])
    states = await asyncio.gather(*[backend.get_status(i) for i in task_ids])
    expected = ["queued", "started", "failed", *["unknown"] * len(others)]
    assert [status.state for status in states] == expected
    assert (await backend.get_status(started)).state == "started"
    running = {status.task_id: status for status in await backend.get_running()}
    assert (running[started].state, running[started].worker) == ("started", worker)
    assert failed not in running
    await age(place, "taskiq_results_status", "updated_at", 61, [started])
    running = {status.task_id: status for status in await backend.get_running()}
    assert running[started].state == (await backend.get_status(started)).state == "lost"
    await age(place, "taskiq_results", "expires_at", 1, [failed])
    assert (await backend.get_status(failed)).state == "expired"
    # An own statement, for a status of a later attempt stays.
    await backend.set_status(TaskStatus(started, "retrying", attempt=1))
    await store(backend, [started])
    assert (await backend.get_status(started)).state == "retrying"
    await backend.forget([queued, started, failed])


async def results_are_taken_once(place: Place) -> None:
    backends = [await place.backend(keep_results=False, track="started") for _ in range(2)]
    backend = backends[0]
    alone, *others = task_ids = place.new_ids(MANY)
    await store(backend, task_ids)
    for task_id in task_ids[:20]:
        await backend.set_progress(task_id, progress_of(1))
        await backend.set_status(TaskStatus(task_id, "started", attempt=1))
    asked = [each.get_result(alone) for each in backends]
    taken = await asyncio.gather(*asked, return_exceptions=True)
    assert sorted(isinstance(each, ResultIsMissingError) for each in taken) == [False, True]
    assert await backend.get_progress(alone) is None
    assert (await backend.get_status(alone)).state == "unknown"
    results = await backend.get_results(others[:100])
    assert {i: result.return_value for i, result in results.items()} == {i: i for i in others[:100]}
    waited = await backends[1].wait_results(others[100:], timeout=SOON)
    assert [result.return_value for result in waited] == others[100:]
    assert await backend.get_results(task_ids) == {}


async def what_is_taken_goes_back_if_some_are_gone(place: Place) -> None:
    backend = await place.backend(keep_results=False)
    [kept] = place.new_ids()
    await store(backend, [kept])
    await backend.set_progress(kept, progress_of("still"))
    reader = backend.runtime.reader
    ids = [backend.models.config.to_column_task_id(i) for i in (kept, *place.new_ids())]
    await reader.get_all(ids, False, needs_every=True)

    async def is_back() -> bool:
        return await backend.is_result_ready(kept)

    await eventually(is_back)
    progress = await backend.get_progress(kept)
    assert progress is not None
    assert progress.meta == "still"


async def tasks_are_forgotten(place: Place) -> None:
    backend = await place.backend(track="started")
    task_ids = place.new_ids(MANY)
    await store(backend, task_ids)
    await backend.set_progress(task_ids[0], progress_of(1))
    await backend.set_status(TaskStatus(task_ids[0], "retrying", attempt=1))
    assert await backend.forget(task_ids[:1]) == 1
    assert await backend.get_progress(task_ids[0]) is None
    assert (await backend.get_status(task_ids[0])).state == "unknown"
    assert await backend.forget(task_ids) == MANY - 1


async def what_is_old_is_pruned(place: Place) -> None:
    backend = await place.backend(track="started", progress_ttl=3600, result_ttl=1000)
    kept, *others = task_ids = place.new_ids(MANY)
    await store(backend, task_ids)
    stale = place.new_ids(MANY)
    for some in (task_ids, stale):
        await asyncio.gather(*[backend.set_progress(i, progress_of(1)) for i in some])
    for some in (others[:5], stale):
        status = [TaskStatus(i, "started", attempt=1) for i in some]
        await asyncio.gather(*map(backend.set_status, status))
    await age(place, "taskiq_results", "expires_at", 1, others)
    await age(place, "taskiq_results_progress", "updated_at", 3601, [kept, *stale])
    await age(place, "taskiq_results_status", "updated_at", 3601, stale)
    assert (await backend.prune(limit=1)).results == 1
    pruned = await backend.prune()
    assert pruned.is_complete
    assert (pruned.results, pruned.progress) == (MANY - 2, MANY)
    assert pruned.statuses >= MANY
    assert list(await backend.get_results([kept, *others])) == [kept]
    progress = await asyncio.gather(*[backend.get_progress(i) for i in [*task_ids, *stale]])
    assert progress[0] is not None
    assert not any(progress[1:])
    states = {(await backend.get_status(i)).state for i in (*others[:5], stale[0])}
    assert states == {"unknown"}


async def what_is_locked_is_left_to_the_next_pruning(place: Place) -> None:
    backend, locked = await place.backend(command_timeout=4), place.new_ids(1)
    await store(backend, locked)
    await age(place, "taskiq_results", "expires_at", 1, locked)
    result: Any = backend.models.Result
    column_id = backend.models.config.to_column_task_id(locked[0])
    async with AsyncSession(place.engine()) as session:
        row = await session.get(result, column_id)
        row.customer = "acme"
        await session.flush()
        await backend.prune()
        assert await place.tables.fetch(ONE, locked[0])
    await backend.prune()
    assert not await place.tables.fetch(ONE, locked[0])


async def pruning_in_the_background_deletes(place: Place) -> None:
    [task_id] = place.new_ids()
    backend = await place.backend()
    await store(backend, [task_id])
    await age(place, "taskiq_results", "expires_at", 1, [task_id])
    for _ in range(2):
        # It begins with the first result that is stored.
        await store(await place.backend(prune_interval=0.1, progress_ttl=3600), place.new_ids())

    async def is_gone() -> bool:
        return not await place.tables.fetch(ONE, task_id)

    await eventually(is_gone)


async def finished_tasks_are_found(place: Place) -> None:
    backend, [mark, slow] = await place.backend(command_timeout=3), place.new_ids(2)
    task_ids = place.new_ids(60)
    await store(backend, task_ids, labels={"mark": mark})
    found, after = [], None
    while True:
        page = await backend.find(label={"mark": mark}, window=3600, after=after, limit=25)
        found += [record.task_id for record in page.records]
        after = page.next
        if after is None:
            break
    assert sorted(found) == sorted(task_ids)
    result: Any = backend.models.Result
    for options in (
        {"where": result.customer.is_(None), "outcome": "succeeded", "window": timedelta(hours=1)},
        {"name": mark, "worker": mark, "window": 3600},
        {"argument": {"a": 1, 0: 2}, "window": 3600},
        {"argument": mark},
    ):
        assert await backend.find(**options)
    details = await backend.get_details(task_ids[0], with_result=True)
    assert details.result is not None
    assert details.result.return_value == task_ids[0]
    assert (await backend.get_details(task_ids[0])).result is None
    await store(backend, [slow], labels={"mark": slow})
    sleeping = sa.func.pg_sleep(60).cast(sa.Text) == ""
    with pytest.raises(StorageError, match="was canceled"):
        await backend.find((result.labels["mark"].astext == slow, sleeping))


async def results_are_searched(place: Place) -> None:
    backend, [mark] = await place.backend(), place.new_ids()
    task_ids = place.new_ids(60)
    await store(backend, task_ids, labels={"mark": mark})
    result: Any = backend.models.Result
    conditions = result.labels["mark"].astext == mark, ~result.is_err
    results = backend.iter_results(conditions, order_by=result.task_id, batch_size=25)
    async with aclosing(results) as rows:
        assert sorted([task_id async for task_id, _ in rows]) == sorted(task_ids)
    everything = sum([1 async for _ in backend.iter_results()])
    assert everything >= len(task_ids)


async def models_are_selected_and_decoded(place: Place) -> None:
    backend, [mark] = await place.backend(track="started"), place.new_ids()
    models: Any = backend.models
    task_ids = place.new_ids(3)
    await store(backend, task_ids, labels={"mark": mark})
    await backend.set_progress(task_ids[0], progress_of(1, state="half"))
    is_marked = models.Result.labels["mark"].astext == mark
    engine = place.engine()
    async with AsyncSession(engine) as session:
        rows = (await session.scalars(sa.select(models.Result).where(is_marked))).all()
        assert sorted(backend.decode(row).return_value for row in rows) == sorted(task_ids)
        joined = (
            sa.select(models.Result.task_id, models.Progress.state)
            .outerjoin(models.Progress, models.Progress.task_id == models.Result.task_id)
            .where(is_marked)
        )
        found = {str(row.task_id): row.state for row in await session.execute(joined)}
        assert found == {**dict.fromkeys(task_ids), task_ids[0]: "half"}
        counted = sa.select(models.Result.is_err, sa.func.count()).where(is_marked)
        grouped = counted.group_by(models.Result.is_err)
        assert [tuple(row) for row in await session.execute(grouped)] == [(False, 3)]
        row = await session.get(models.Result, models.config.to_column_task_id(task_ids[0]))
        row.customer = "acme"
        await session.commit()


async def columns_of_the_applications_own_are_filled(place: Place) -> None:
    backend = await place.backend(
        track="started", extra_values=lambda task_id, _: {"customer": task_id[:8]}
    )
    alone, *others = task_ids = place.new_ids(MANY)
    await backend.set_status(TaskStatus(alone, "started"))
    await store(backend, [alone])
    await store(backend, others)
    await store(backend, [alone])
    rows = await place.tables.fetch(
        "SELECT task_id::text, customer FROM taskiq_results WHERE task_id::text = ANY ($1)",
        task_ids,
    )
    assert {row["task_id"]: row["customer"] for row in rows} == {i: i[:8] for i in task_ids}
    assert (await backend.get_status(alone)).state == "succeeded"


async def workers_are_listed(place: Place) -> None:
    backend, [name] = await place.backend(track="started"), place.new_ids()
    broker = worker_of(backend, worker=name)
    await broker.startup()

    async def listed() -> dict[str, Any]:
        return {each.worker: each for each in await backend.get_workers()}

    async def is_listed() -> bool:
        return name in await listed()

    await eventually(is_listed)
    first = (await listed())[name]
    await backend.set_status(TaskStatus(place.new_ids()[0], "started", worker=name))
    assert ((await listed())[name].is_alive, (await listed())[name].running) == (True, 1)

    async def has_beaten() -> bool:
        return bool((await listed())[name].seen_at > first.seen_at)

    await eventually(has_beaten)
    await broker.shutdown()
    assert name not in await listed()


async def lost_tasks_get_an_error(place: Place) -> None:
    backend, [name] = await place.backend(track="started"), place.new_ids()
    broker = worker_of(backend, worker=name, abandon_lost=True)
    await broker.startup()
    lost = place.new_ids(3)
    for task_id in lost:
        await backend.set_status(TaskStatus(task_id, "started", "task", worker="gone"))
    await age(place, "taskiq_results_status", "updated_at", 61, lost)
    results = await backend.wait_results(lost, timeout=SOON)
    assert all(isinstance(result.error, TaskAbandonedError) for result in results)
    await broker.shutdown()


OPERATIONS = [
    results_are_stored_and_read,
    results_are_waited_for,
    progress_is_stored_and_watched,
    statuses_are_stored_and_read,
    results_are_taken_once,
    what_is_taken_goes_back_if_some_are_gone,
    tasks_are_forgotten,
    what_is_old_is_pruned,
    what_is_locked_is_left_to_the_next_pruning,
    pruning_in_the_background_deletes,
    finished_tasks_are_found,
    results_are_searched,
    models_are_selected_and_decoded,
    columns_of_the_applications_own_are_filled,
    workers_are_listed,
    lost_tasks_get_an_error,
]
