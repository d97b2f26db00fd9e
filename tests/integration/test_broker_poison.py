"""Tasks that nobody finishes, and tasks that nobody knows."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from taskiq import AsyncTaskiqTask, BrokerMessage, TaskiqResult
from taskiq.brokers.inmemory_broker import InmemoryResultBackend

from taskiq_sa_pg import SQLAlchemyBroker, TaskAbandonedError
from tests.conftest import eventually
from tests.integration.brokers import (
    SOON,
    UNPOLLED,
    Brokers,
    acknowledge,
    hungry,
    id_of,
    listening,
    send,
    take,
)
from tests.integration.conftest import StartBroker
from tests.tasks import new_id


async def until_parked(brokers: Brokers, task_id: str) -> None:
    async def is_parked() -> bool:
        rows = await brokers.database.fetch(
            f"SELECT 1 FROM {brokers.queue} WHERE task_id = $1 AND available_at = 'infinity'",
            task_id,
        )
        return bool(rows)

    await eventually(is_parked)


async def result_of(broker: SQLAlchemyBroker, task_id: str) -> TaskiqResult[Any]:
    task: AsyncTaskiqTask[Any] = AsyncTaskiqTask(task_id, broker.result_backend)
    return await task.wait_result(check_interval=0.01, timeout=2 * SOON)


async def test_what_no_worker_lives_to_finish_is_parked_and_its_waiter_is_told(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await start_broker(results=True, max_deliveries=2, timings=UNPOLLED)
    task_id = await send(broker, customer="5")
    waiting = asyncio.create_task(result_of(broker, task_id))
    async with listening(broker) as messages:
        for _ in range(2):
            await take(messages)  # and what takes it dies
            await each_pair.expire()
    fine = await send(broker)
    async with hungry(broker) as coming:
        result = await waiting
        await until_parked(each_pair, task_id)
        async with asyncio.timeout(SOON):
            message = await coming
        assert id_of(broker, message) == fine
        await acknowledge(message)
    assert result.is_err
    assert isinstance(result.error, TaskAbandonedError)
    assert result.error.args == (task_id, 2)
    assert result.labels["customer"] == "5"
    assert f"task {task_id} (task): " in caplog.text
    assert [record.levelno for record in caplog.records if task_id in record.getMessage()] == [
        logging.ERROR
    ]


async def test_the_result_of_a_task_that_was_never_acknowledged_stays(brokers: Brokers) -> None:
    """As that of one that blocks its worker's event loop for longer than the lease."""
    broker = await brokers.start(results=True, max_deliveries=1, timings=UNPOLLED)
    task_id = await send(broker)
    result: TaskiqResult[Any] = TaskiqResult(is_err=False, return_value=7, execution_time=1)
    async with listening(broker) as messages:
        await take(messages)
        await broker.result_backend.set_result(task_id, result)
        await brokers.expire()
    async with hungry(broker):
        await until_parked(brokers, task_id)
    assert (await result_of(broker, task_id)).return_value == 7


async def test_it_is_parked_whatever_the_result_backend(brokers: Brokers) -> None:
    """taskiq's own, which has no database, and none at all."""
    for results in (InmemoryResultBackend[Any](), False):
        broker = await brokers.start(results=results, timings=UNPOLLED)
        task_id = await send(broker)
        await brokers.change("deliveries = 5", "available_at < 'infinity'")
        async with hungry(broker):
            await until_parked(brokers, task_id)
        if results:
            assert isinstance((await result_of(broker, task_id)).error, TaskAbandonedError)


class Failing(InmemoryResultBackend[Any]):
    """Stores nothing until it is mended."""

    def __init__(self) -> None:
        super().__init__()
        self.has_failed = asyncio.Event()
        self.is_mended = False

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        if not self.is_mended:
            self.has_failed.set()
            raise ConnectionError("no results today")
        await super().set_result(task_id, result)


async def test_it_is_not_parked_before_its_waiter_is_told(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the result backend fails, it is tried again when the lease has ended."""
    backend = Failing()
    broker = await start_broker(results=backend, max_deliveries=1, timings=UNPOLLED)
    task_id = await send(broker)
    await each_pair.change("deliveries = 1")
    async with hungry(broker):
        async with asyncio.timeout(SOON):
            await backend.has_failed.wait()
    assert len(broker.runtime.claims) == 0
    assert "its error result cannot be stored, retrying" in caplog.text
    assert 0 < await each_pair.seconds_until_due(task_id) < 600
    backend.is_mended = True
    await each_pair.expire()
    async with hungry(broker):
        await until_parked(each_pair, task_id)
        assert isinstance((await result_of(broker, task_id)).error, TaskAbandonedError)


async def test_a_message_that_nobody_can_read_is_parked_too(
    brokers: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await brokers.start(results=True, timings=UNPOLLED)
    task_id = new_id()
    await broker.kick(BrokerMessage(task_id=task_id, task_name="task", message=b"?", labels={}))
    await brokers.change("deliveries = 5")
    async with hungry(broker):
        await until_parked(brokers, task_id)
    assert isinstance((await result_of(broker, task_id)).error, TaskAbandonedError)
    assert "its message cannot be read" in caplog.text


async def test_a_parked_task_that_is_sent_again_starts_anew(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker(timings=UNPOLLED)
    await send(broker, "order-1")
    await each_pair.change("deliveries = 5")
    async with hungry(broker) as coming:
        await until_parked(each_pair, "order-1")
        await send(broker, "order-1")
        async with asyncio.timeout(SOON):
            message = await coming
        [row] = await each_pair.rows()
        assert row["deliveries"] == 1
        await acknowledge(message)
    assert await each_pair.rows() == []


async def test_a_broker_that_is_shut_down_ends_what_it_is_giving_up(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await start_broker(results=True, timings=UNPOLLED)
    task_id = await send(broker)
    await each_pair.change("deliveries = 5")
    results = broker.models.config.table_name
    lock = await asyncpg.connect(each_pair.database.direct_dsn)
    transaction = lock.transaction()
    await transaction.start()
    await lock.execute(f'LOCK TABLE "{results}"')
    messages = broker.listen()
    coming: asyncio.Task[Any] = asyncio.ensure_future(anext(messages))

    async def is_storing() -> bool:
        return "active" in await each_pair.database.sessions(each_pair.name)

    await eventually(is_storing)
    closing = asyncio.create_task(broker.shutdown())
    await asyncio.sleep(0)
    await lock.close()
    await closing
    with pytest.raises(Exception, match="shut down while this listened"):
        await coming
    await messages.aclose()
    await until_parked(each_pair, task_id)
    assert "never retrieved" not in caplog.text


async def test_an_unknown_name_is_left_to_others_and_counts_as_no_delivery(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    """As the tasks of a new release, which the workers of the old one get first."""
    old, new = await start_broker(timings=UNPOLLED), await start_broker(timings=UNPOLLED)
    new.register_task(lambda: None, task_name="new")
    for _ in range(3):
        await send(old, name="new")
    known = await send(old)
    async with hungry(old) as coming:
        async with asyncio.timeout(SOON):
            assert id_of(old, await coming) == known

        async def are_released() -> bool:
            return all(
                row["worker"] is None for row in await each_pair.rows() if row["task_name"] == "new"
            )

        await eventually(are_released)
        await acknowledge(coming.result())
        assert [row["deliveries"] for row in await each_pair.rows()] == [0, 0, 0]
        assert caplog.text.count('task "new" is not known to this worker') == 1
    async with listening(new) as messages:
        taken = await take(messages, 3)
        assert [row["deliveries"] for row in await each_pair.rows()] == [1, 1, 1]
        await acknowledge(*taken)


async def test_a_task_that_is_registered_later_runs_then(brokers: Brokers) -> None:
    broker = await brokers.start(timings=replace(UNPOLLED, between_polls=0.2))
    task_id = await send(broker, name="late")
    [first] = await brokers.rows()
    async with hungry(broker) as coming:

        async def is_refused() -> bool:
            [row] = await brokers.rows()
            return row["claim"] > first["claim"] and row["worker"] is None

        await eventually(is_refused)
        broker.register_task(lambda: None, task_name="late")
        async with asyncio.timeout(SOON):
            message = await coming
        assert id_of(broker, message) == task_id
        await acknowledge(message)
