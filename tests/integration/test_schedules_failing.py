"""What becomes of a tick that could not be sent, and of what is sent in another way meanwhile."""

from datetime import timedelta
from typing import Any

import pytest
from taskiq import InMemoryBroker, TaskiqMessage, TaskiqMiddleware, TaskiqScheduler
from taskiq.middlewares import SmartRetryMiddleware
from taskiq.receiver import Receiver

from taskiq_sa_pg import (
    ConfigurationError,
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
)
from tests.integration.schedulers import NOON, Scheduler, Schedulers, look_at_once, schedule

SECOND = timedelta(seconds=1)


class Failing(TaskiqMiddleware):
    """Fails before the broker is asked to send."""

    is_on = True

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        if self.is_on:
            raise RuntimeError("not today")
        return message


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_a_failed_middleware_spends_no_tick_and_leaves_nothing_to_others(
    schedulers: Schedulers,
) -> None:
    failing = Failing()
    each = await schedulers.start(lambda broker: broker.add_middlewares(failing))
    await each.source.add_schedule(schedule(interval=3600))
    await each.update()
    with pytest.raises(RuntimeError):
        await each.look(NOON)
    failing.is_on = False
    greet = each.broker.find_task("greet")
    assert greet is not None
    sent = await greet.kiq("directly, in the same asyncio task")
    assert await schedulers.sent() == [sent.task_id]
    await each.look(NOON + 5 * SECOND)
    assert len(await schedulers.sent()) == 2


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_a_scheduler_with_another_broker_is_told(schedulers: Schedulers) -> None:
    each = await schedulers.start()
    other = InMemoryBroker()

    @other.task("greet")
    async def greet(name: str) -> None: ...

    await each.source.add_schedule(schedule(time=NOON))
    [task] = await each.source.get_schedules()
    with pytest.raises(ConfigurationError, match="create TaskiqScheduler with the source's broker"):
        await TaskiqScheduler(other, [each.source]).on_ready(each.source, task)


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_who_loses_a_tick_leaves_no_status(schedulers: Schedulers) -> None:
    def prepare(broker: SQLAlchemyBroker) -> None:
        dsn = schedulers.database.dsn
        broker.with_result_backend(SQLAlchemyResultBackend(dsn, track="started"))
        broker.add_middlewares(TaskMetadataMiddleware())

    several = [await schedulers.start(prepare) for _ in range(3)]
    await several[0].source.add_schedule(schedule(interval=3600))
    await look_at_once(several, NOON)
    assert len(await schedulers.sent()) == 1
    assert await schedulers.database.fetch("SELECT * FROM taskiq_results_status") == []


async def test_a_scheduled_retry_tells_who_waits_for_the_task(schedulers: Schedulers) -> None:
    runs: list[Any] = []

    async def fail_once() -> str:
        runs.append(None)
        if len(runs) == 1:
            raise ValueError
        return "done"

    broker = SQLAlchemyBroker(
        schedulers.database.dsn_of(schedulers.driver), check_schema="off"
    ).with_result_backend(
        SQLAlchemyResultBackend(schedulers.database.dsn_of(schedulers.driver), check_schema="off")
    )
    scheduler = Scheduler(broker)
    broker.add_middlewares(
        SmartRetryMiddleware(
            default_retry_label=True, default_delay=0, schedule_source=scheduler.source
        )
    )
    task = broker.register_task(fail_once, "fail_once")
    await broker.startup()  # as a worker, which does not start the source
    sent = await task.kiq()
    receiver = Receiver(broker, run_startup=False)
    listening = broker.listen()
    await receiver.callback(await anext(listening))
    assert await schedulers.sent() == []
    [row] = (await schedulers.stored()).values()
    await scheduler.update()
    await scheduler.look(row["time"])
    assert await schedulers.sent() == [sent.task_id]
    await receiver.callback(await anext(listening))
    assert (await sent.wait_result(timeout=10)).return_value == "done"
    await listening.aclose()
    await broker.shutdown()
    assert (await schedulers.stored(), await schedulers.sent()) == ({}, [])
