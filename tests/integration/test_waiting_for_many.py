"""wait_results() and as_completed(): many tasks, as they come or once all are there."""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from pydantic import BaseModel
from taskiq import AsyncTaskiqTask
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg import InvalidTaskIdError, ResultDecodeError, ResultIsMissingError
from tests.conftest import eventually
from tests.integration.waiters import (
    SOON,
    Backend,
    Backends,
    counted_fetches,
    table_of,
    until_healthy,
    until_nobody_waits,
    until_waiting,
    waiters_of,
)
from tests.tasks import new_id, result_of


class Order(BaseModel):
    number: int


async def store(backend: Backend, *task_ids: str) -> None:
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in task_ids])


async def stored(backends: Backends, task_ids: list[str]) -> set[str]:
    query = f'SELECT task_id FROM "{table_of(backends.database)}" WHERE task_id = ANY($1)'
    return {row["task_id"] for row in await backends.database.fetch(query, task_ids)}


async def collect(iterator: Any) -> list[Any]:
    return [(task, result.return_value) async for task, result in iterator]


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
@pytest.mark.usefixtures("blind")
async def test_wait_results_returns_all_in_the_order_given(
    each_driver: Backends, keep_results: bool
) -> None:
    backend = await each_driver.start(keep_results=keep_results)
    task_ids = [new_id() for _ in range(450)]
    await store(backend, *task_ids[::3])
    waiting = asyncio.create_task(backend.wait_results(task_ids, timeout=SOON))
    await until_healthy(backend)
    await until_waiting(backend)
    await store(backend, *reversed(task_ids[1::3]))
    assert not waiting.done()
    await store(backend, *task_ids[2::3])
    assert [result.return_value for result in await waiting] == task_ids
    assert await stored(each_driver, task_ids) == (set(task_ids) if keep_results else set())


async def test_wait_results_takes_nothing_before_all_are_there(each_driver: Backends) -> None:
    backend = await each_driver.start(keep_results=False)
    task_ids = [new_id() for _ in range(3)]
    await store(backend, *task_ids[:2])
    for timeout in (0, 0.2):
        with pytest.raises(TaskiqResultTimeoutError) as caught:
            await backend.wait_results(task_ids, timeout=timeout)
        assert caught.value.timeout == timeout
    assert await stored(each_driver, task_ids) == set(task_ids[:2])
    await store(backend, task_ids[2])
    results = await backend.wait_results(task_ids, timeout=0)
    assert [result.return_value for result in results] == task_ids


@pytest.mark.usefixtures("blind")
async def test_wait_results_tells_of_one_that_somebody_else_took(
    each_driver: Backends,
) -> None:
    backend, thief = [await each_driver.start(keep_results=False) for _ in range(2)]
    task_ids = [new_id() for _ in range(2)]
    waiting = asyncio.create_task(backend.wait_results(task_ids, timeout=SOON))
    await until_waiting(backend)
    await until_healthy(backend)
    with counted_fetches() as fetches:
        await store(backend, task_ids[0])

        async def has_looked() -> bool:
            return any("look for results" in purpose for purpose in fetches)

        await eventually(has_looked)
    await until_waiting(backend)
    await thief.get_result(task_ids[0])
    await store(backend, task_ids[1])
    with pytest.raises(ResultIsMissingError, match=task_ids[0]):
        await waiting


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
@pytest.mark.usefixtures("blind")
async def test_as_completed_yields_in_the_order_of_completion(
    each_driver: Backends, keep_results: bool
) -> None:
    backend = await each_driver.start(keep_results=keep_results)
    worker = await each_driver.start()
    task_ids = [new_id() for _ in range(8)]
    order = task_ids[::2] + task_ids[1::2]
    await store(worker, order[0])
    came = []
    async for task, result in backend.as_completed(task_ids, timeout=SOON):
        came.append(task)
        assert result.return_value == task
        if len(came) == 1:
            await until_healthy(backend)
        if len(came) < len(order):
            await store(worker, order[len(came)])
    assert came == order


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_as_completed_yields_a_task_as_often_as_it_was_given(
    backends: Backends, keep_results: bool
) -> None:
    backend = await backends.start(keep_results=keep_results)
    first, second = new_id(), new_id()
    await store(backend, first)
    iterating = asyncio.create_task(
        collect(backend.as_completed([second, first, second], timeout=SOON))
    )
    await until_waiting(backend)
    await store(backend, second)
    assert await iterating == [(first, first), (second, second), (second, second)]


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_several_spellings_of_a_uuid_are_one_task(
    each_driver: Backends, keep_results: bool
) -> None:
    backend = await each_driver.start(field_for_task_id="Uuid", keep_results=keep_results)
    task_id = uuid.uuid4()
    spellings = [str(task_id), task_id.hex.upper(), task_id.urn]
    await backend.set_result(task_id.hex, result_of(7))
    results = await backend.wait_results(spellings, timeout=0)
    assert [result.return_value for result in results] == [7, 7, 7]
    await backend.set_result(task_id.hex, result_of(8))
    came = await collect(backend.as_completed(spellings, timeout=SOON))
    assert came == [(spelling, 8) for spelling in spellings]


async def test_whoever_breaks_out_of_as_completed_leaves_the_others_there(
    each_driver: Backends,
) -> None:
    backend = await each_driver.start(keep_results=False)
    task_ids = [new_id() for _ in range(10)]
    await store(backend, *task_ids)
    async for _ in backend.as_completed(task_ids):
        break
    assert len(await stored(each_driver, task_ids)) == 9
    await until_nobody_waits(backend)
    async with aclosing(backend.as_completed([*task_ids, new_id()])) as iterator:
        assert (await anext(iterator))[0] in task_ids
    assert waiters_of(backend).waiting == 0  # closed there and then
    assert len(await stored(each_driver, task_ids)) == 8


async def test_as_completed_goes_on_without_what_somebody_else_took(each_driver: Backends) -> None:
    backend, thief = [await each_driver.start(keep_results=False) for _ in range(2)]
    task_ids = [new_id() for _ in range(3)]
    await store(backend, *task_ids)
    came = []
    async for task, _ in backend.as_completed(task_ids, timeout=SOON):
        came.append(task)
        for other in set(task_ids) - {task}:
            if len(came) == 1:
                await thief.get_result(other)
    assert len(came) == 1


async def test_as_completed_ends_with_an_error_at_its_timeout(each_driver: Backends) -> None:
    backend = await each_driver.start()
    there, missing = new_id(), new_id()
    await store(backend, there)
    for timeout in (0, 0.3):
        iterator = aiter(backend.as_completed([there, missing], timeout))
        assert (await anext(iterator))[0] == there
        with pytest.raises(TaskiqResultTimeoutError) as caught:
            await anext(iterator)
        assert caught.value.timeout == timeout
        await until_nobody_waits(backend)


async def test_a_slow_user_of_as_completed_is_not_interrupted(backends: Backends) -> None:
    backend = await backends.start()
    there, missing = new_id(), new_id()
    await store(backend, there)
    steps = []

    async def iterate() -> None:
        async for task, _ in backend.as_completed([there, missing], timeout=0.5):
            await asyncio.sleep(0.7)
            steps.append(task)

    with pytest.raises(TaskiqResultTimeoutError):
        await iterate()
    assert steps == [there]


@pytest.mark.parametrize("with_logs", [True, False])
@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_return_types_errors_and_logs_are_those_of_wait_result(
    backends: Backends, keep_results: bool, with_logs: bool
) -> None:
    backend = await backends.start(keep_results=keep_results)
    tasks: list[AsyncTaskiqTask[Any]] = [
        AsyncTaskiqTask(new_id(), backend, Order) for _ in range(2)
    ]
    for wait in ("wait_results", "as_completed"):
        await backend.set_result(tasks[0].task_id, result_of({"number": 7}, log="line"))
        error = result_of(None, is_err=True, error=ValueError("no"), log="line")
        await backend.set_result(tasks[1].task_id, error)
        if wait == "wait_results":
            order, failure = await backend.wait_results(tasks, SOON, with_logs)
        else:
            came = [pair async for pair in backend.as_completed(tasks, SOON, with_logs)]
            assert {id(task) for task, _ in came} == set(map(id, tasks))
            order, failure = sorted((result for _, result in came), key=lambda r: r.is_err)
        assert order.return_value == Order(number=7)
        assert (type(failure.error), failure.return_value) == (ValueError, None)
        assert (order.log, failure.log) == (("line", "line") if with_logs else (None, None))


async def test_no_tasks_are_no_waiting(backends: Backends) -> None:
    backend = await backends.start()
    with counted_fetches() as fetches:
        assert await backend.wait_results([], timeout=0) == []
        assert await backend.wait_results(iter(())) == []
        assert await collect(backend.as_completed([])) == []
    assert fetches == []


def calls(backend: Backend) -> dict[str, Callable[[Any], Any]]:
    return {
        "wait_results": backend.wait_results,
        "as_completed": lambda tasks: collect(backend.as_completed(tasks)),
    }


@pytest.mark.parametrize("name", ["wait_results", "as_completed"])
async def test_one_str_is_refused_instead_of_waiting_for_its_letters(
    backends: Backends, name: str
) -> None:
    backend = await backends.start()
    with pytest.raises(TypeError, match=rf"{name}\(\) takes several tasks, not one str: 'task'"):
        await calls(backend)[name]("task")


@pytest.mark.parametrize("name", ["wait_results", "as_completed"])
async def test_one_bad_id_is_refused_before_anything_is_taken(
    backends: Backends, name: str
) -> None:
    backend = await backends.start(keep_results=False)
    good = new_id()
    await store(backend, good)
    with pytest.raises(InvalidTaskIdError):
        await calls(backend)[name]([good, "a\x00b"])
    assert await backend.is_result_ready(good)


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
@pytest.mark.parametrize("name", ["wait_results", "as_completed"])
async def test_what_cannot_be_read_back_is_a_failure_and_stays(
    backends: Backends, name: str, keep_results: bool
) -> None:
    backend = await backends.start(keep_results=keep_results)
    task_ids = [new_id() for _ in range(3)]
    await store(backend, *task_ids)
    table = table_of(backends.database)
    await backends.database.fetch(
        f"UPDATE \"{table}\" SET return_value = 'garbage' WHERE task_id = $1", task_ids[1]
    )
    if name == "wait_results":
        results = await backend.wait_results(task_ids, SOON)
    else:
        came = dict([pair async for pair in backend.as_completed(task_ids, SOON)])
        results = [came[task_id] for task_id in task_ids]
    assert [result.is_err for result in results] == [False, True, False]
    assert isinstance(results[1].error, ResultDecodeError)
    assert await stored(backends, task_ids) == (set(task_ids) if keep_results else {task_ids[1]})
