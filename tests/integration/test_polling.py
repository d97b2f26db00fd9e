"""is_result_ready(), asked again and again: answered from memory, and never for long by mistake."""

import asyncio
from typing import Any

import pytest
import taskiq
from taskiq import AsyncTaskiqTask

from tests.conftest import eventually
from tests.integration.waiters import (
    SOON,
    Backend,
    Backends,
    counted_fetches,
    heard_by,
    insert,
    listener_of,
    table_of,
    until_healthy,
    waiting_of,
)
from tests.tasks import new_id, result_of

POLLS = 50


async def until_polls_are_quiet(backend: Backend, task_id: str) -> None:
    """Polls until it is healthy and a poll costs nothing."""

    async def is_quiet() -> bool:
        with counted_fetches() as fetches:
            assert await backend.is_result_ready(task_id) is False
        return not fetches and listener_of(backend).is_healthy

    await eventually(is_quiet)


async def is_ready_soon(backend: Backend, task_id: str) -> None:
    async def is_ready() -> bool:
        return await backend.is_result_ready(task_id)

    await eventually(is_ready)


@pytest.fixture
def rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are so rare that none is made by chance; what was found is good for as long."""
    monkeypatch.setattr("taskiq_sa_pg.waiting._SECONDS_BETWEEN_LOOKS", 1000.0)
    monkeypatch.setattr("taskiq_sa_pg.waiting._MAX_AGE", 1001.0)


@pytest.mark.usefixtures("rarely")
async def test_polls_of_an_unfinished_task_run_no_statements(each_driver: Backends) -> None:
    backend, worker = [await each_driver.start() for _ in range(2)]
    task_id = new_id()
    await until_polls_are_quiet(backend, task_id)
    with counted_fetches() as fetches:
        for _ in range(POLLS):
            assert await backend.is_result_ready(task_id) is False
        # The look that becoming healthy makes may be late.
        assert len([purpose for purpose in fetches if task_id in purpose]) == 0
        assert len(fetches) <= 1
    await worker.set_result(task_id, result_of(1))
    await is_ready_soon(backend, task_id)
    assert await backend.is_result_ready(task_id) is True
    assert waiting_of(backend)._polls.repeated(0.0) == set()


async def test_a_look_now_and_then_is_all_that_many_polls_cost(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskiq_sa_pg.waiting._SECONDS_BETWEEN_LOOKS", 0.1)
    backend = await each_driver.start()
    task_ids = [new_id() for _ in range(200)]

    async def poll() -> None:
        await asyncio.gather(*[backend.is_result_ready(i) for i in task_ids])

    for _ in range(3):
        await poll()
    for task_id in task_ids:
        await until_polls_are_quiet(backend, task_id)
    looks = 1  # one may be on its way
    look = waiting_of(backend)._look

    async def count() -> None:
        nonlocal looks
        looks += 1
        await look()

    monkeypatch.setattr(waiting_of(backend), "_look", count)
    with counted_fetches() as fetches:

        async def has_looked_twice() -> bool:
            await poll()
            return looks >= 3

        await eventually(has_looked_twice)
        assert len(fetches) <= looks


@pytest.mark.usefixtures("rarely")
async def test_the_first_and_the_second_poll_look(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await each_driver.start()
    assert backend._parts is not None
    operations = backend._parts.operations
    is_ready, looks = operations.is_ready, []

    async def count(column_id: Any, task_id: str) -> Any:
        looks.append(task_id)
        return await is_ready(column_id, task_id)

    monkeypatch.setattr(operations, "is_ready", count)
    polled, stored = new_id(), new_id()
    async with heard_by(backend):
        for number in (1, 2, 2, 2):
            assert await backend.is_result_ready(polled) is False
            assert len(looks) == number
        assert await backend.is_result_ready(stored) is False
        await insert(each_driver.database, stored, 1)
        assert await backend.is_result_ready(stored) is True


@pytest.mark.parametrize("silence", ["sql", "silent", "lost"])
async def test_what_nobody_notified_is_ready_after_the_next_look(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch, silence: str
) -> None:
    monkeypatch.setattr("taskiq_sa_pg.waiting._SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr("taskiq_sa_pg.waiting._MAX_AGE", 1000.0)
    backend = await each_driver.start()
    worker = await each_driver.start(notify=silence != "silent")
    task_id = new_id()
    await until_polls_are_quiet(backend, task_id)
    if silence == "lost":
        monkeypatch.setattr(listener_of(backend), "_hear", lambda *_: None)
    if silence == "sql":
        await insert(each_driver.database, task_id, 1)
    else:
        await worker.set_result(task_id, result_of(1))
    await is_ready_soon(backend, task_id)


async def test_what_was_found_long_ago_is_not_believed(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the regular looks fail."""
    monkeypatch.setattr("taskiq_sa_pg.waiting._SECONDS_BETWEEN_LOOKS", 1000.0)
    monkeypatch.setattr("taskiq_sa_pg.waiting._MAX_AGE", 0.2)
    backend = await each_driver.start()
    task_id = new_id()
    await until_polls_are_quiet(backend, task_id)
    await insert(each_driver.database, task_id, 1)
    await is_ready_soon(backend, task_id)


@pytest.mark.usefixtures("rarely")
async def test_nothing_is_answered_from_memory_while_nothing_is_heard(
    each_driver: Backends,
) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    await until_polls_are_quiet(backend, task_id)
    listener_of(backend).is_healthy = False
    await insert(each_driver.database, task_id, 1)
    assert await backend.is_result_ready(task_id) is True


@pytest.mark.usefixtures("rarely")
async def test_after_a_gap_it_is_looked_first(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    await until_polls_are_quiet(backend, task_id)

    async def see_nothing() -> None: ...

    # So that no other look makes up for it.
    monkeypatch.setattr(waiting_of(backend), "_look", see_nothing)
    [pid] = await each_driver.listening()
    await each_driver.database.fetch("SELECT pg_terminate_backend($1)", pid)

    async def is_unhealthy() -> bool:
        return not listener_of(backend).is_healthy

    await eventually(is_unhealthy)
    await insert(each_driver.database, task_id, 1)
    await until_healthy(backend)
    assert await backend.is_result_ready(task_id) is True


async def test_without_notify_every_poll_looks(each_driver: Backends) -> None:
    backend = await each_driver.start(notify=False)
    task_id = new_id()
    with counted_fetches() as fetches:
        for _ in range(10):
            assert await backend.is_result_ready(task_id) is False
    assert len(fetches) == 10
    await backend.set_result(task_id, result_of(1))
    assert await backend.is_result_ready(task_id) is True


@pytest.mark.usefixtures("rarely")
async def test_a_result_that_is_taken_is_not_ready_any_more(each_driver: Backends) -> None:
    backend = await each_driver.start(keep_results=False)
    task_id = new_id()
    for _ in range(2):
        await until_polls_are_quiet(backend, task_id)
        await backend.set_result(task_id, result_of(1))
        await is_ready_soon(backend, task_id)
        assert (await backend.get_result(task_id)).return_value == 1
        assert await backend.is_result_ready(task_id) is False


@pytest.mark.usefixtures("rarely")
async def test_all_spellings_of_a_uuid_are_one_task(each_driver: Backends) -> None:
    backend = await each_driver.start(field_for_task_id="Uuid")
    task_id = new_id()
    await until_polls_are_quiet(backend, task_id)
    with counted_fetches() as fetches:
        assert await backend.is_result_ready(f"{{{task_id.upper()}}}") is False
    assert len(fetches) <= 1
    await backend.set_result(task_id, result_of(1))
    await is_ready_soon(backend, f"urn:uuid:{task_id}")


@pytest.mark.usefixtures("rarely")
async def test_taskiqs_own_waiting_works(each_driver: Backends) -> None:
    backend, worker = [await each_driver.start() for _ in range(2)]
    tasks: list[AsyncTaskiqTask[Any]] = [AsyncTaskiqTask(new_id(), backend) for _ in range(20)]
    waiting = asyncio.create_task(tasks[0].wait_result(check_interval=0.01, timeout=SOON))
    gathering = asyncio.create_task(taskiq.gather(*tasks, periodicity=0.01, timeout=SOON))
    await until_polls_are_quiet(backend, tasks[1].task_id)
    for task in tasks:
        await worker.set_result(task.task_id, result_of(task.task_id))
    assert (await waiting).return_value == tasks[0].task_id
    assert [r.return_value for r in await gathering] == [task.task_id for task in tasks]


@pytest.mark.usefixtures("rarely")
async def test_no_result_is_hidden_by_polls_at_the_same_time(each_driver: Backends) -> None:
    """Who heard that a result is stored finds it ready, whatever looks are still under way."""
    backend, worker = [await each_driver.start() for _ in range(2)]
    task_ids = [new_id() for _ in range(100)]
    is_over = False

    async def poll() -> None:
        while not is_over:
            await asyncio.gather(*[backend.is_result_ready(i) for i in task_ids])
            await asyncio.sleep(0)

    async with heard_by(backend):
        polling = [asyncio.create_task(poll()) for _ in range(3)]
        for task_id in task_ids:
            await worker.set_result(task_id, result_of(1))
            waiting_of(backend)._hear(table_of(each_driver.database), f'["{task_id}"]')
            assert await backend.is_result_ready(task_id) is True
        is_over = True
        await asyncio.wait(polling)
