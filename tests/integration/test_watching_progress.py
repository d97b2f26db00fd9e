"""watch_progress(): the progress as it is, each change of it, and the end with the result."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg import InvalidTaskIdError, ResultDecodeError
from taskiq_sa_pg.timings import Timings
from tests.integration.waiters import (
    SOON,
    Backends,
    channel_of,
    listener_of,
    table_of,
    until_healthy,
    until_nobody_waits,
    until_waiting,
    waiters_of,
)
from tests.tasks import new_id, progress_of, result_of

OFTEN = Timings(between_looks=0.05)


async def metas(iterator: AsyncIterator[Any]) -> list[Any]:
    return [progress.meta async for progress in iterator]


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
@pytest.mark.usefixtures("blind")
async def test_each_change_comes_by_notification_until_the_result(
    each_driver: Backends, keep_results: bool
) -> None:
    backend = await each_driver.start(keep_results=keep_results)
    worker = await each_driver.start()
    task_id = new_id()
    await worker.set_progress(task_id, progress_of(0))
    seen = []
    async for progress in backend.watch_progress(task_id, timeout=SOON):
        seen.append((progress.state, progress.meta))
        await until_healthy(backend)
        if len(seen) < 4:
            await worker.set_progress(task_id, progress_of(len(seen)))
        else:
            await worker.set_result(task_id, result_of("done"))
    assert seen == [("running", i) for i in range(4)]
    assert await backend.is_result_ready(task_id)
    assert not waiters_of(backend).subscriptions


@pytest.mark.usefixtures("blind")
async def test_the_first_progress_may_come_later_than_the_watcher(each_driver: Backends) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    watching = asyncio.create_task(metas(backend.watch_progress(task_id, timeout=SOON)))
    await until_healthy(backend)
    await until_waiting(backend)
    await backend.set_progress(task_id, progress_of("late"))
    await until_waiting(backend)
    await backend.set_result(task_id, result_of(1))
    assert await watching == ["late"]


@pytest.mark.usefixtures("deaf")
async def test_what_was_not_heard_is_found_by_the_look(each_driver: Backends) -> None:
    backend = await each_driver.start(timings=OFTEN)
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(0))
    seen = []
    async for progress in backend.watch_progress(task_id, timeout=SOON):
        seen.append(progress.meta)
        await until_healthy(backend)
        if len(seen) < 3:
            await backend.set_progress(task_id, progress_of(len(seen)))
        else:
            await backend.set_result(task_id, result_of("done"))
    assert seen == [0, 1, 2]


@pytest.mark.usefixtures("deaf")
async def test_progress_that_does_not_change_comes_once(backends: Backends) -> None:
    backend = await backends.start(timings=OFTEN)
    task_id = new_id()
    await backend.set_progress(task_id, progress_of("same"))
    watching = asyncio.create_task(metas(backend.watch_progress(task_id, timeout=SOON)))
    await until_healthy(backend)
    for _ in range(3):
        await until_waiting(backend)
        await waiters_of(backend).look()
    await backend.set_result(task_id, result_of(1))
    assert await watching == ["same"]


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_of_a_finished_task_the_last_progress_comes(
    each_driver: Backends, keep_results: bool
) -> None:
    backend = await each_driver.start(keep_results=keep_results)
    for timeout in (None, SOON, 0):
        task_id = new_id()
        await backend.set_result(task_id, result_of("done"))
        assert await metas(backend.watch_progress(task_id, timeout)) == []
        await backend.set_progress(task_id, progress_of("last"))
        assert await metas(backend.watch_progress(task_id, timeout)) == ["last"]
        assert await backend.is_result_ready(task_id)


async def test_it_ends_although_somebody_takes_the_result_at_once(each_driver: Backends) -> None:
    backend, worker = [await each_driver.start(keep_results=False) for _ in range(2)]
    for _ in range(10):
        task_id = new_id()
        watching = asyncio.create_task(metas(backend.watch_progress(task_id, timeout=SOON)))
        await until_waiting(backend)
        await until_healthy(backend)
        # In one turn: who is told of the result finds it gone.
        await worker.set_result(task_id, result_of("done"))
        await worker.get_result(task_id)
        assert await watching == []


@pytest.mark.parametrize("timeout", [0, 1])
async def test_without_a_result_in_time_it_ends_with_an_error(
    each_driver: Backends, timeout: float
) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    iterator = aiter(backend.watch_progress(task_id, timeout))
    assert (await anext(iterator)).meta == 1
    with pytest.raises(TaskiqResultTimeoutError) as caught:
        await anext(iterator)
    assert caught.value.timeout == timeout
    assert not waiters_of(backend).subscriptions


async def test_who_is_slow_between_two_steps_is_not_interrupted(backends: Backends) -> None:
    backend = await backends.start()
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    steps = []

    async def watch() -> None:
        async for progress in backend.watch_progress(task_id, timeout=0.5):
            await asyncio.sleep(0.7)
            steps.append(progress.meta)

    with pytest.raises(TaskiqResultTimeoutError):
        await watch()
    assert steps == [1]


@pytest.mark.usefixtures("blind")
async def test_a_slow_watcher_gets_the_last_of_what_he_missed(each_driver: Backends) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(0))
    seen = []
    async for progress in backend.watch_progress(task_id, timeout=SOON):
        seen.append(progress.meta)
        if progress.meta == 0:
            for meta in range(1, 6):
                await backend.set_progress(task_id, progress_of(meta))
            await backend.set_result(task_id, result_of("done"))
            await until_healthy(backend)
            # Its notifications come while nobody waits.
            waiters_of(backend).hear(channel_of(each_driver.database), f'["{task_id}"]')
    assert seen == [0, 5]


async def test_breaking_out_unsubscribes(each_driver: Backends) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    async for _ in backend.watch_progress(task_id):
        break
    await until_nobody_waits(backend)
    async with aclosing(backend.watch_progress(task_id)) as iterator:
        await anext(iterator)
        assert waiters_of(backend).subscriptions
    assert not waiters_of(backend).subscriptions


async def test_cancelling_a_watcher_unsubscribes(each_driver: Backends) -> None:
    backend = await each_driver.start()
    for turns in range(20):
        watching = asyncio.create_task(metas(backend.watch_progress(new_id())))
        for _ in range(turns):
            await asyncio.sleep(0)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        assert not waiters_of(backend).subscriptions
    assert listener_of(backend).state != "idle"


async def test_what_cannot_be_read_is_an_error(backends: Backends) -> None:
    backend = await backends.start()
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    progress_table = f"{table_of(backends.database)}_progress"
    await backends.database.fetch(
        f"UPDATE \"{progress_table}\" SET meta = 'garbage' WHERE task_id = $1", task_id
    )
    with pytest.raises(ResultDecodeError):
        await metas(backend.watch_progress(task_id))
    with pytest.raises(InvalidTaskIdError):
        await metas(backend.watch_progress("a\x00b"))
