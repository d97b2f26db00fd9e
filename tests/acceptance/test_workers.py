"""Tasks that real worker processes run, seen by their client through public names alone."""

import asyncio
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import ModuleType

import pytest
import taskiq
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from taskiq_sa_pg import ResultSerializationError
from taskiq_sa_pg.engines import make_engine
from tests.conftest import eventually
from tests.tasks import new_id, progress_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMEOUT = 30


async def test_a_declared_return_type_comes_back(tasks: ModuleType) -> None:
    placed_at = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
    task = await tasks.place.kiq(7, placed_at)
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.return_value == tasks.Order(number=7, price=Decimal("9.90"), placed_at=placed_at)


async def test_a_synchronous_task_returns_a_dataclass(tasks: ModuleType) -> None:
    task = await tasks.mirror.kiq(1, 2)
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.return_value == tasks.Point(2, 1)


async def test_a_hundred_tasks_gathered_return_each_its_own_result(tasks: ModuleType) -> None:
    sent = [await tasks.add.kiq(number, 1000) for number in range(100)]
    results = await taskiq.gather(*sent, timeout=TIMEOUT)
    assert [result.return_value for result in results] == [1000 + n for n in range(100)]
    by_id = await tasks.backend.get_results([task.task_id for task in sent])
    assert by_id == dict(zip([task.task_id for task in sent], results, strict=True))


async def test_an_exception_arrives_with_its_class_attributes_and_cause(
    tasks: ModuleType,
) -> None:
    task = await tasks.pay.kiq()
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.is_err
    with pytest.raises(tasks.PaymentError, match="refused with code 7") as caught:
        result.raise_for_error()
    assert caught.value.code == 7
    assert isinstance(caught.value.__cause__, ConnectionError)


async def test_a_value_that_cannot_be_stored_gives_an_error_and_no_hanging_waiter(
    tasks: ModuleType,
) -> None:
    task = await tasks.return_a_lambda.kiq()
    result = await task.wait_result(timeout=TIMEOUT)
    assert isinstance(result.error, ResultSerializationError)
    assert "function" in str(result.error)


async def test_the_last_progress_outlives_the_result(tasks: ModuleType) -> None:
    task = await tasks.report.kiq(5)
    await task.wait_result(timeout=TIMEOUT)
    progress = await task.get_progress()
    assert (progress.state, progress.meta) == ("STARTED", 4)


async def test_retries_end_in_one_row_of_the_last_attempt(tasks: ModuleType) -> None:
    task = await tasks.fail_until_attempt.kiq(2)
    result = await task.wait_result(timeout=TIMEOUT)
    assert result.return_value == 2
    stored = tasks.backend.models.Result
    engine = make_engine(tasks.dsn)
    async with AsyncSession(engine) as session:
        rows = await session.scalars(select(stored).where(stored.task_id == task.task_id))
        assert [(row.attempt, row.is_err) for row in rows] == [(2, False)]
    await engine.dispose()


async def test_two_clients_wait_for_one_result(tasks: ModuleType) -> None:
    task = await tasks.add.kiq(1, 2)
    first, second = await asyncio.gather(
        task.wait_result(timeout=TIMEOUT), task.wait_result(timeout=TIMEOUT)
    )
    assert first == second


async def test_what_runs_is_known_with_its_worker(tasks: ModuleType) -> None:
    gate = new_id()
    sent = [await tasks.hold.kiq(gate) for _ in range(6)]
    ids = {task.task_id for task in sent}

    async def all_run() -> bool:
        return {status.task_id for status in await tasks.backend.get_running()} == ids

    await eventually(all_run, TIMEOUT)
    running = {status.task_id: status for status in await tasks.backend.get_running()}
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
