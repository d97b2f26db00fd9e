"""How the waiting for one task ends: with a timeout, the result, a cancellation or shutdown."""

import asyncio
from typing import Any

import pytest
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg import NotStartedError
from taskiq_sa_pg.database import Database as Connected
from tests.integration.waiters import (
    SOON,
    Backends,
    listener_of,
    until_healthy,
    until_nobody_waits,
    until_waiting,
    waiters_of,
)
from tests.tasks import new_id, result_of


@pytest.mark.parametrize("timeout", [0, 0.05])
async def test_no_result_in_time_is_an_error_of_taskiqs(
    each_driver: Backends, timeout: float
) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    with pytest.raises(TaskiqResultTimeoutError) as caught:
        await backend.wait_result(task_id, timeout=timeout)
    assert caught.value.timeout == timeout
    assert caught.value.__cause__ is None
    await backend.set_result(task_id, result_of(7))
    assert (await backend.wait_result(task_id, timeout=0)).return_value == 7


async def test_no_result_is_taken_and_then_too_late(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time ends between the deletion and its answer."""
    backend = await each_driver.start(keep_results=False)
    task_id = new_id()
    transact = Connected.transact

    async def transact_slowly(*args: Any, **kwargs: Any) -> Any:
        taken = await transact(*args, **kwargs)
        await asyncio.sleep(0.15)
        return taken

    monkeypatch.setattr(Connected, "transact", transact_slowly)
    await backend.is_result_ready(task_id)  # connects
    await backend.set_result(task_id, result_of(7))
    assert (await backend.wait_result(task_id, timeout=0.1)).return_value == 7


@pytest.mark.parametrize("timeout", [None, -1, -0.5])
async def test_none_or_a_negative_timeout_sets_no_limit(
    backends: Backends, timeout: float | None
) -> None:
    backend = await backends.start()
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout))
    await until_healthy(backend)
    await until_waiting(backend)
    assert not waiting.done()
    await backend.set_result(task_id, result_of(7))
    assert (await waiting).return_value == 7


async def test_of_several_waiters_one_takes_the_result(each_driver: Backends) -> None:
    one, other = [await each_driver.start(keep_results=False) for _ in range(2)]
    task_id = new_id()
    waiting = [asyncio.create_task(b.wait_result(task_id)) for b in (one, other) * 3]
    for round_number in range(3):
        for backend in (one, other):
            await until_healthy(backend)
        await one.set_result(task_id, result_of(round_number))
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=SOON)
        assert [task.result().return_value for task in done] == [round_number]
        assert await other.is_result_ready(task_id) is False
        waiting = [task for task in waiting if task not in done]
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_a_cancelled_waiter_leaves_nothing_behind(each_driver: Backends) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    for turns in range(20):
        waiting = asyncio.create_task(backend.wait_result(task_id))
        if turns == 10:
            await until_waiting(backend)
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not waiters_of(backend).subscriptions
    await backend.set_result(task_id, result_of(7))
    assert (await backend.wait_result(task_id, timeout=SOON)).return_value == 7


async def test_waiters_of_one_task_do_not_end_each_other(backends: Backends) -> None:
    backend = await backends.start()
    task_id = new_id()
    first, second = [asyncio.create_task(backend.wait_result(task_id)) for _ in range(2)]
    await until_healthy(backend)
    await until_waiting(backend, 2)
    first.cancel()
    await until_waiting(backend, 1)
    await backend.set_result(task_id, result_of(7))
    assert (await second).return_value == 7
    await until_nobody_waits(backend)


async def test_shutdown_ends_all_waiting_with_an_error(each_driver: Backends) -> None:
    backend = await each_driver.start()
    task_ids = [new_id() for _ in range(3)]

    async def iterate(iterator: Any) -> None:
        async for _ in iterator:
            pass

    waiting = [
        *[asyncio.create_task(backend.wait_result(task_id)) for task_id in task_ids],
        asyncio.create_task(backend.wait_results(task_ids)),
        asyncio.create_task(iterate(backend.as_completed(task_ids))),
        asyncio.create_task(iterate(backend.watch_progress(task_ids[0]))),
    ]
    await until_healthy(backend)
    await until_waiting(backend, len(waiting))
    waiters, listener = waiters_of(backend), listener_of(backend)
    await backend.shutdown()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [NotStartedError] * len(waiting)
    assert not waiters.subscriptions
    assert not listener.is_healthy
    with pytest.raises(NotStartedError):
        await backend.wait_result(task_ids[0])


async def test_an_iterator_that_is_begun_after_shutdown_starts_nothing(backends: Backends) -> None:
    backend = await backends.start()
    iterators = [backend.as_completed([new_id()]), backend.watch_progress(new_id())]
    waiters = waiters_of(backend)
    await backend.shutdown()
    tasks = asyncio.all_tasks()
    for iterator in iterators:
        with pytest.raises(NotStartedError):
            await anext(aiter(iterator))
    assert (waiters.waiting, waiters.listener_state) == (0, "idle")
    assert asyncio.all_tasks() == tasks
