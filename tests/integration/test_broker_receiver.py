"""taskiq's own receiver on the queue: acknowledgements, retries, requeues."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from taskiq import (
    Context,
    SimpleRetryMiddleware,
    SmartRetryMiddleware,
    TaskiqDepends,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
)
from taskiq.acks import AcknowledgeType
from taskiq.brokers.inmemory_broker import InmemoryResultBackend
from taskiq.exceptions import TaskRejectedError

from taskiq_sa_pg import SQLAlchemyBroker
from tests.conftest import eventually
from tests.integration.brokers import (
    PATIENT,
    SOON,
    Brokers,
    acknowledge,
    hungry,
    listening,
    send,
    take,
    working,
)
from tests.integration.conftest import StartBroker
from tests.integration.waiters import counted_fetches

# Absent from the oldest taskiq that is supported; there the label is of no effect.
MANUAL = getattr(AcknowledgeType, "MANUAL", None)


async def until_empty(brokers: Brokers) -> None:
    async def is_empty() -> bool:
        return await brokers.rows() == []

    await eventually(is_empty)


class Watching(InmemoryResultBackend[Any]):
    """Notes how many tasks are in the queue when a result is stored."""

    def __init__(self, brokers: Brokers) -> None:
        super().__init__()
        self.brokers = brokers
        self.seen: list[int] = []

    async def look(self) -> None:
        self.seen.append(len(await self.brokers.rows()))

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        await self.look()
        await super().set_result(task_id, result)


@pytest.mark.parametrize(
    ("when", "seen"),
    [("when_received", [0, 0]), ("when_executed", [1, 0]), ("when_saved", [1, 1])],
)
async def test_a_task_is_acknowledged_when_it_is_to_be(
    when: str, seen: list[int], start_broker: StartBroker, each_pair: Brokers
) -> None:
    """While it runs, and when its result is stored, it is in the queue or not."""
    backend = Watching(each_pair)
    broker = await start_broker(results=backend)

    @broker.task(task_name="look")
    async def look() -> None:
        await backend.look()

    async with working(broker, ack_type=AcknowledgeType(when)):
        task = await look.kiq()
        result = await task.wait_result(check_interval=0.01, timeout=SOON)
        assert not result.is_err, result.error
        await until_empty(each_pair)
    assert backend.seen == seen


class Breaking(TaskiqMiddleware):
    """Breaks down after a task's execution, once."""

    has_broken = False

    def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        if not self.has_broken:
            self.has_broken = True
            raise ZeroDivisionError("a bug of a middleware")


async def test_what_ends_without_an_acknowledgement_is_delivered_again(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """When its lease ends: it is renewed no more, though taskiq keeps its last message."""
    broker = await start_broker(results=True, timings=PATIENT, lease=0.6)
    broker.add_middlewares(Breaking())
    runs = []

    @broker.task(task_name="run")
    async def run() -> int:
        runs.append(1)
        return len(runs)

    async with working(broker):
        task = await run.kiq()
        result = await task.wait_result(check_interval=0.01, timeout=SOON)
        assert result.return_value == 2
        await until_empty(each_pair)


@pytest.mark.skipif(MANUAL is None, reason="taskiq 0.12 has no manual acknowledgement")
async def test_with_manual_acknowledgement_it_is_the_task_that_does_it(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """The one that does not is delivered again when its lease ends, and renewed until it does."""
    broker = await start_broker(results=True, timings=PATIENT, lease=0.6)
    runs = []
    has_waited = asyncio.Event()

    @broker.task(task_name="run", ack_type="manual")
    async def run(context: Context = TaskiqDepends()) -> int:
        runs.append(1)
        if len(runs) == 1:
            await has_waited.wait()
        else:
            await context.ack()
        return len(runs)

    async with working(broker):
        with counted_fetches() as purposes:
            task = await run.kiq()

            async def is_renewed() -> bool:
                return sum(each.startswith("renew") for each in purposes) >= 4

            await eventually(is_renewed)
        assert len(runs) == 1
        has_waited.set()

        async def has_run_again() -> bool:
            return len(runs) == 2

        await eventually(has_run_again)
        await until_empty(each_pair)
        assert (await task.wait_result(timeout=SOON)).return_value == 2


async def test_a_requeued_task_runs_again_at_once(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    """The first delivery does not acknowledge the second away."""
    broker = await start_broker(results=True, timings=PATIENT)
    runs: list[str] = []

    @broker.task(task_name="run")
    async def run(context: Context = TaskiqDepends()) -> int:
        runs.append(context.message.task_id)
        if len(runs) < 3:
            await context.requeue()
        return len(runs)

    async with working(broker):
        task = await run.kiq()
        assert (await task.wait_result(check_interval=0.01, timeout=SOON)).return_value == 3
        await until_empty(each_pair)
    assert runs == [task.task_id] * 3
    assert "its lease" not in caplog.text


async def test_a_rejected_task_is_over(start_broker: StartBroker, each_pair: Brokers) -> None:
    broker = await start_broker(results=True, timings=PATIENT)

    @broker.task(task_name="run")
    async def run(context: Context = TaskiqDepends()) -> None:
        context.reject()

    async with working(broker):
        task = await run.kiq()
        result = await task.wait_result(check_interval=0.01, timeout=SOON)
        await until_empty(each_pair)
    assert isinstance(result.error, TaskRejectedError)


async def run_to_the_last_attempt(
    broker: SQLAlchemyBroker, brokers: Brokers, when: str, *, is_silent: bool
) -> None:
    attempts = []
    stored: list[bool] = []
    store = broker.result_backend.set_result

    async def note(task_id: str, result: TaskiqResult[Any]) -> None:
        stored.append(result.is_err)
        await store(task_id, result)

    broker.result_backend.set_result = note  # type: ignore[method-assign]  # to listen

    @broker.task(task_name="run", retry_on_error=True, max_retries=3)
    async def run() -> int:
        attempts.append(1)
        if len(attempts) < 3:
            raise ValueError("not yet")
        return len(attempts)

    async with working(broker, ack_type=AcknowledgeType(when)):
        _ = await run.kiq()

        async def has_succeeded() -> bool:
            return False in stored

        await eventually(has_succeeded)
        await until_empty(brokers)
    assert len(attempts) == 3
    # In any order: an attempt that acknowledges first may store its error after the next has ended.
    assert sorted(stored) == ([False] if is_silent else [False, True, True])


@pytest.mark.parametrize("when", ["when_received", "when_executed", "when_saved"])
@pytest.mark.parametrize("is_silent", [True, False], ids=["no_result", "results"])
async def test_simple_retries_go_on_to_the_last_attempt(
    when: str, is_silent: bool, brokers: Brokers
) -> None:
    """Each is sent under the same task id while the delivery before is not acknowledged."""
    broker = await brokers.start(results=True, timings=PATIENT)
    broker.add_middlewares(SimpleRetryMiddleware(no_result_on_retry=is_silent))
    await run_to_the_last_attempt(broker, brokers, when, is_silent=is_silent)


@pytest.mark.parametrize("is_silent", [True, False], ids=["no_result", "results"])
async def test_smart_retries_go_on_to_the_last_attempt(
    is_silent: bool, start_broker: StartBroker, each_pair: Brokers
) -> None:
    """After their delay."""
    broker = await start_broker(results=True, timings=PATIENT)
    middleware = SmartRetryMiddleware(default_delay=0.1, no_result_on_retry=is_silent)
    broker.add_middlewares(middleware)
    await run_to_the_last_attempt(broker, each_pair, "when_saved", is_silent=is_silent)


async def test_what_fails_for_good_is_acknowledged(brokers: Brokers) -> None:
    broker = await brokers.start(results=True, timings=PATIENT)
    broker.add_middlewares(SmartRetryMiddleware(default_delay=0.01))

    @broker.task(task_name="run", retry_on_error=True, max_retries=2)
    async def run() -> None:
        raise ValueError("never")

    async with working(broker):
        task = await run.kiq()
        result = await task.wait_result(check_interval=0.01, timeout=SOON)
        await until_empty(brokers)
    assert isinstance(result.error, ValueError)


async def test_a_worker_that_stops_finishes_what_it_has_begun(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """And gives back the rest, which runs elsewhere: each runs once."""
    brokers = [await start_broker(timings=replace(PATIENT, unused_claim=600)) for _ in range(2)]
    runs: list[int] = []
    is_running, may_end = asyncio.Event(), asyncio.Event()

    async def run(number: int) -> None:
        runs.append(number)
        is_running.set()
        await may_end.wait()

    tasks = [each.register_task(run, task_name="run") for each in brokers]
    for number in range(30):
        await tasks[0].kiq(number)
    async with working(brokers[0], max_async_tasks=5):
        await asyncio.wait_for(is_running.wait(), SOON)
        may_end_later = asyncio.get_running_loop().call_soon(may_end.set)
    may_end_later.cancel()
    begun = len(runs)
    assert len(await each_pair.rows()) == 30 - begun
    assert all(row["worker"] is None for row in await each_pair.rows())
    async with working(brokers[1]):
        await until_empty(each_pair)
    assert sorted(runs) == list(range(30))


async def test_what_ends_together_is_acknowledged_together(start_broker: StartBroker) -> None:
    """As the tasks of a busy worker do, whose results are stored together."""
    broker = await start_broker(timings=PATIENT)
    await asyncio.gather(*[send(broker) for _ in range(63)])
    async with listening(broker) as messages:
        taken = await take(messages, 63)
        with counted_fetches() as purposes:
            await asyncio.gather(*[acknowledge(each) for each in taken])
        assert sum(each.startswith("acknowledge") for each in purposes) <= 4


async def test_the_renewals_end_with_the_broker(brokers: Brokers) -> None:
    """Nothing runs in the background afterwards."""
    before = asyncio.all_tasks()
    broker = await brokers.start(timings=PATIENT)
    async with hungry(broker):
        pass
    await broker.shutdown()
    assert asyncio.all_tasks() == before
