"""is_result_ready(): always asks the table, together with all who ask at the same time."""

import asyncio
from typing import Any

import pytest
import taskiq
from taskiq import AsyncTaskiqTask

from taskiq_sa_pg.timings import Timings
from tests.conftest import eventually
from tests.integration.waiters import (
    SOON,
    Backend,
    Backends,
    counted_fetches,
    heard_by,
    insert,
    listener_of,
    waiters_of,
)
from tests.tasks import new_id, result_of

# Who asks does not depend on any look but his own.
RARELY = Timings(between_looks=1000, between_unheard_looks=1000)


def polls_of(backend: Backend) -> tuple[int, int]:
    """How many there were, and how many statements they took."""
    operation = backend.stats().operations["is_result_ready"]
    return operation.calls, operation.batches


async def test_whoever_asks_after_a_result_was_stored_finds_it_ready(each_driver: Backends) -> None:
    """Stored by this process, by another one, or by hand; and whatever was asked before."""
    backend, worker = [await each_driver.start(timings=RARELY) for _ in range(2)]
    silent = await each_driver.start(timings=RARELY, notify=False)
    for storing in (backend, worker, silent, None):
        task_id = new_id()
        for _ in range(3):
            assert await backend.is_result_ready(task_id) is False
        if storing is None:
            await insert(each_driver.database, task_id, 1)
        else:
            await storing.set_result(task_id, result_of(1))
        assert await backend.is_result_ready(task_id) is True


async def test_no_result_is_hidden_by_polls_at_the_same_time(each_driver: Backends) -> None:
    """Whatever statements are still under way, and whatever was heard meanwhile."""
    backend, worker = [await each_driver.start(timings=RARELY) for _ in range(2)]
    task_ids = [new_id() for _ in range(40)]
    is_over = False

    async def poll() -> None:
        while not is_over:
            await asyncio.gather(*[backend.is_result_ready(i) for i in task_ids])
            await asyncio.sleep(0)

    async with heard_by(backend):
        polling = [asyncio.create_task(poll()) for _ in range(3)]
        for task_id in task_ids:
            await worker.set_result(task_id, result_of(1))
            assert await backend.is_result_ready(task_id) is True
        is_over = True
        await asyncio.wait(polling)


async def test_a_result_that_is_taken_is_not_ready_any_more(each_driver: Backends) -> None:
    backend = await each_driver.start(keep_results=False)
    task_id = new_id()
    for _ in range(2):
        await backend.set_result(task_id, result_of(1))
        assert await backend.is_result_ready(task_id) is True
        assert (await backend.get_result(task_id)).return_value == 1
        assert await backend.is_result_ready(task_id) is False


async def test_all_spellings_of_a_uuid_are_one_task(each_driver: Backends) -> None:
    backend = await each_driver.start(field_for_task_id="Uuid")
    task_id = new_id()
    for is_stored in (False, True):
        for spelling in (task_id, f"{{{task_id.upper()}}}", f"urn:uuid:{task_id}"):
            assert await backend.is_result_ready(spelling) is is_stored
        await backend.set_result(task_id, result_of(1))


@pytest.mark.parametrize(("polls", "statements"), [(1, 1), (200, 8), (1_000, 15)])
async def test_polls_at_the_same_time_share_statements(
    each_driver: Backends, polls: int, statements: int
) -> None:
    """A thousand that ask every 0.2 s, as taskiq's own waiters do, need 75 a second at most."""
    backend = await each_driver.start()
    with counted_fetches() as fetches:
        answers = await asyncio.gather(*[backend.is_result_ready(new_id()) for _ in range(polls)])
    assert answers == [False] * polls
    assert len(fetches) <= statements
    assert polls_of(backend) == (polls, len(fetches))


async def test_taskiqs_own_waiters_share_statements_and_do_not_listen(
    each_driver: Backends,
) -> None:
    backend, worker = [await each_driver.start() for _ in range(2)]
    tasks: list[AsyncTaskiqTask[Any]] = [AsyncTaskiqTask(new_id(), backend) for _ in range(200)]
    waiting = [
        asyncio.create_task(task.wait_result(check_interval=0.001, timeout=SOON))
        for task in tasks[:-1]
    ]
    gathering = asyncio.create_task(taskiq.gather(*tasks, periodicity=0.001, timeout=SOON))

    async def have_polled() -> bool:
        return polls_of(backend)[0] > 2_000

    await eventually(have_polled)
    polls, statements = polls_of(backend)
    assert statements < polls / 35  # a thousand ask 5,000 times a second
    assert (waiters_of(backend).waiting, listener_of(backend).state) == (0, "idle")
    await asyncio.gather(*[worker.set_result(t.task_id, result_of(t.task_id)) for t in tasks])
    assert [(await w).return_value for w in waiting] == [task.task_id for task in tasks[:-1]]
    assert [r.return_value for r in await gathering] == [task.task_id for task in tasks]
