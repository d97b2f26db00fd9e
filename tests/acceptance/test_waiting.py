"""Waiting for what real worker processes store, through public names alone."""

import asyncio
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT = 30


async def test_wait_result_returns_what_the_task_declares(tasks: ModuleType) -> None:
    task = await tasks.mirror.kiq(1, 2)
    result = await tasks.backend.wait_result(task, timeout=TIMEOUT)
    assert result.return_value == tasks.Point(2, 1)


async def test_a_failed_task_ends_the_waiting_with_its_error(tasks: ModuleType) -> None:
    task = await tasks.pay.kiq()
    result = await tasks.backend.wait_result(task, timeout=TIMEOUT)
    assert isinstance(result.error, tasks.PaymentError)


async def test_only_the_last_attempt_ends_the_waiting(tasks: ModuleType) -> None:
    task = await tasks.fail_until_attempt.kiq(2)
    assert (await tasks.backend.wait_result(task, timeout=TIMEOUT)).return_value == 2


async def test_the_results_of_many_tasks_come_together_or_one_by_one(tasks: ModuleType) -> None:
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


async def test_progress_is_watched_until_the_task_is_over(tasks: ModuleType) -> None:
    task = await tasks.report.kiq(5)
    seen = [p.meta async for p in tasks.backend.watch_progress(task, timeout=TIMEOUT)]
    assert seen == sorted(set(seen))
    assert seen[-1] == 4
    assert (await tasks.backend.wait_result(task, timeout=0)).return_value == "reported"
