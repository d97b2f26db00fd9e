"""Tasks that real worker processes run, seen and awaited by a client through public names alone."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import taskiq
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from taskiq_sa_pg import ResultSerializationError
from taskiq_sa_pg.database import make_engine
from tests.acceptance.conftest import Tasks
from tests.conftest import eventually
from tests.tasks import new_id, progress_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT = 30


async def test_a_declared_return_type_comes_back(tasks_of_each: Tasks) -> None:
    placed_at = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
    task = await tasks_of_each.place.kiq(7, placed_at)
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.return_value == tasks_of_each.Order(
        number=7, price=Decimal("9.90"), placed_at=placed_at
    )


async def test_a_synchronous_task_returns_a_dataclass(tasks_of_each: Tasks) -> None:
    task = await tasks_of_each.mirror.kiq(1, 2)
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.return_value == tasks_of_each.Point(2, 1)


async def test_a_hundred_tasks_gathered_return_each_its_own_result(tasks: Tasks) -> None:
    sent = [await tasks.add.kiq(number, 1000) for number in range(100)]
    results = await taskiq.gather(*sent, timeout=TIMEOUT)
    assert [result.return_value for result in results] == [1000 + n for n in range(100)]
    by_id = await tasks.backend.get_results([task.task_id for task in sent])
    assert by_id == dict(zip([task.task_id for task in sent], results, strict=True))


async def test_an_exception_arrives_with_its_class_attributes_and_cause(
    tasks_of_each: Tasks,
) -> None:
    task = await tasks_of_each.pay.kiq()
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.is_err
    with pytest.raises(tasks_of_each.PaymentError, match="refused with code 7") as caught:
        result.raise_for_error()
    assert caught.value.code == 7
    assert isinstance(caught.value.__cause__, ConnectionError)


async def test_a_value_that_cannot_be_stored_gives_an_error_and_no_hanging_waiter(
    tasks_of_each: Tasks,
) -> None:
    task = await tasks_of_each.return_a_lambda.kiq()
    result = await task.wait_result(timeout=TIMEOUT)
    assert isinstance(result.error, ResultSerializationError)
    assert "function" in str(result.error)


async def test_the_last_progress_outlives_the_result(tasks_of_each: Tasks) -> None:
    task = await tasks_of_each.report.kiq(5)
    await task.wait_result(timeout=TIMEOUT)
    progress = await task.get_progress()
    assert (progress.state, progress.meta) == ("STARTED", 4)


async def test_retries_end_in_one_row_of_the_last_attempt(tasks: Tasks) -> None:
    task = await tasks.fail_until_attempt.kiq(2)
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.return_value == 2
    stored = tasks.backend.models.Result
    engine = make_engine(tasks.dsn)
    async with AsyncSession(engine) as session:
        rows = await session.scalars(select(stored).where(stored.task_id == task.task_id))
        assert [(row.attempt, row.is_err) for row in rows] == [(2, False)]
    await engine.dispose()


async def test_two_clients_wait_for_one_result(tasks: Tasks) -> None:
    task = await tasks.add.kiq(1, 2)
    first, second = await asyncio.gather(
        task.wait_result(timeout=TIMEOUT), task.wait_result(timeout=TIMEOUT)
    )
    assert first == second


async def test_what_runs_is_known_with_its_worker(tasks: Tasks) -> None:
    gate = new_id()
    sent = [await tasks.hold.kiq(gate) for _ in range(6)]
    ids = {task.task_id for task in sent}

    async def all_run() -> bool:
        return {status.task_id for status in await tasks.backend.get_running()} == ids

    await eventually(all_run, TIMEOUT)
    running = {status.task_id: status for status in await tasks.backend.get_running()}
    workers = [each for each in await tasks.backend.get_workers() if each.running]
    assert all(each.is_alive for each in workers)
    assert {each.worker for each in workers} == {status.worker for status in running.values()}
    assert sum(each.running for each in workers) == len(ids)
    await tasks.backend.set_progress(gate, progress_of(None))
    for task in sent:
        result = await task.wait_result(timeout=TIMEOUT)
        status = await tasks.backend.get_status(task.task_id)
        assert status.state == "succeeded"
        assert status.worker == f"{socket.gethostname()}:{result.return_value}"
        assert status.queued_at <= status.started_at
        assert status.started_at - status.finished_at < timedelta(seconds=1)  # of two clocks
        assert running[task.task_id] == replace(status, state="started", finished_at=None)
    assert await tasks.backend.get_running() == []


async def test_wait_result_returns_what_the_task_declares(tasks_of_each: Tasks) -> None:
    task = await tasks_of_each.mirror.kiq(1, 2)
    result = await tasks_of_each.backend.wait_result(task, timeout=TIMEOUT)
    assert result.return_value == tasks_of_each.Point(2, 1)


async def test_a_failed_task_ends_the_waiting_with_its_error(
    tasks_of_each: Tasks,
) -> None:
    task = await tasks_of_each.pay.kiq()
    result = await tasks_of_each.backend.wait_result(task, timeout=TIMEOUT)
    assert isinstance(result.error, tasks_of_each.PaymentError)


async def test_only_the_last_attempt_ends_the_waiting(tasks: Tasks) -> None:
    task = await tasks.fail_until_attempt.kiq(2)
    assert (await tasks.backend.wait_result(task, timeout=TIMEOUT)).return_value == 2


async def test_the_results_of_many_tasks_come_together_or_one_by_one(
    tasks: Tasks,
) -> None:
    sent = [await tasks.add.kiq(number, 1000) for number in range(50)]
    came, results = await asyncio.gather(
        collect(tasks.backend.as_completed(sent, timeout=TIMEOUT)),
        tasks.backend.wait_results(sent, timeout=TIMEOUT),
    )
    assert [result.return_value for result in results] == [1000 + n for n in range(50)]
    assert {task.task_id: value for task, value in came} == {
        task.task_id: 1000 + number for number, task in enumerate(sent)
    }


async def collect(iterator: AsyncIterator[Any]) -> list[tuple[Any, Any]]:
    return [(task, result.return_value) async for task, result in iterator]


async def test_progress_is_watched_until_the_task_is_over(tasks_of_each: Tasks) -> None:
    task = await tasks_of_each.report.kiq(5)
    seen = [p.meta async for p in tasks_of_each.backend.watch_progress(task, timeout=TIMEOUT)]
    assert seen == sorted(set(seen))
    assert seen[-1] == 4
    assert (await tasks_of_each.backend.wait_result(task, timeout=0)).return_value == "reported"
