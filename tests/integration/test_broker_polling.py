"""When a worker looks: when it is told, when something is due, and now and then."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from taskiq_sa_pg import SQLAlchemyBroker
from tests.conftest import eventually
from tests.integration.brokers import (
    SOON,
    UNPOLLED,
    Brokers,
    acknowledge,
    listening,
    models_of,
    send,
    take,
    until_healthy,
)
from tests.integration.conftest import StartBroker
from tests.integration.waiters import counted_fetches, overheard


@asynccontextmanager
async def waiting(broker: SQLAlchemyBroker) -> AsyncIterator[asyncio.Task[Any]]:
    """The next task, for which a worker waits; it comes and is acknowledged."""
    async with listening(broker) as messages:
        with counted_fetches() as purposes:
            coming: asyncio.Task[Any] = asyncio.ensure_future(anext(messages))

            async def has_looked() -> bool:
                return len(purposes) >= 2

            await eventually(has_looked)
            yield coming
            async with asyncio.timeout(SOON):
                await acknowledge(await coming)


async def test_a_worker_that_waits_is_told(start_broker: StartBroker) -> None:
    """By another process."""
    sender, broker = await start_broker(), await start_broker(timings=UNPOLLED)
    async with waiting(broker):
        await until_healthy(broker)
        await send(sender)


async def test_a_lost_notification_costs_at_most_one_poll(start_broker: StartBroker) -> None:
    sender = await start_broker(notify=False)
    broker = await start_broker(timings=replace(UNPOLLED, between_polls=0.2))
    async with waiting(broker):
        await until_healthy(broker)
        await send(sender)


async def test_without_notifications_workers_look_often(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """Nobody listens then, and nothing is told."""
    timings = replace(UNPOLLED, between_unheard_polls=0.1)
    broker = await start_broker(timings=timings, notify=False)
    channel = models_of().config.queue_channel
    async with overheard(each_pair.database, channel) as heard:
        async with waiting(broker):
            await send(broker)
            assert await each_pair.listening() == []
        await each_pair.database.fetch("SELECT pg_notify($1, '[]')", channel)

        async def is_heard() -> bool:
            return bool(heard)

        await eventually(is_heard)
        assert heard == [(channel, "[]")]


async def test_a_listener_that_hears_nothing_yet_has_workers_look_often(brokers: Brokers) -> None:
    """Such as one that cannot connect."""
    sender = await brokers.start(notify=False)
    timings = replace(UNPOLLED, between_unheard_polls=0.1)
    nowhere = "postgresql://nobody@127.0.0.1:1/nothing"
    broker = await brokers.start(timings=timings, listen_dsn=nowhere)
    async with waiting(broker):
        await send(sender)
    listener = broker.runtime.listener
    assert listener is not None
    assert not listener.is_healthy


async def test_a_delayed_task_comes_when_it_is_due(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """Neither earlier nor at some poll."""
    broker = await start_broker(timings=UNPOLLED, lease=60)
    async with waiting(broker) as coming:
        await until_healthy(broker)
        await send(broker, delay="0.3")
        await coming
        [row] = await each_pair.rows()
        taken_after = (row["available_at"] - row["queued_at"]).total_seconds() - 60
        assert taken_after >= 0.3


async def test_the_earliest_of_many_delayed_ones_wakes_a_worker(brokers: Brokers) -> None:
    broker = await brokers.start(timings=UNPOLLED)
    for delay, name in ((500, "a"), (0.2, "b"), (300, "b")):
        await send(broker, delay=delay, queue_name=name, priority=1)
    async with listening(broker.listening_to("a", "b")) as messages:
        await acknowledge(*await take(messages))


async def test_an_idle_worker_sends_two_statements_for_each_poll(start_broker: StartBroker) -> None:
    """However many queues it listens to."""
    broker = await start_broker(timings=replace(UNPOLLED, between_polls=0.2))
    names = [f"queue-{number}" for number in range(20)]
    async with waiting(broker.listening_to("default", *names)):
        await until_healthy(broker)
        with counted_fetches() as purposes:

            async def has_polled() -> bool:
                return len(purposes) >= 8

            loop = asyncio.get_running_loop()
            started_at = loop.time()
            await eventually(has_polled)
        # The first may have come at once; between four there are three pauses.
        assert loop.time() - started_at > 2 * 0.2
        await send(broker)


async def test_what_is_told_of_another_queue_wakes_nobody(brokers: Brokers) -> None:
    broker = await brokers.start(timings=UNPOLLED)
    assert broker.runtime.listener is not None
    broker.runtime.listener.start()
    await until_healthy(broker)  # before it looks: this wakes it, too
    async with waiting(broker):
        channel = models_of().config.queue_channel
        async with overheard(brokers.database, channel) as heard:
            with counted_fetches() as purposes:
                await send(broker, queue_name="mail")

                async def is_told() -> bool:
                    return (channel, '["mail"]') in heard

                await eventually(is_told)
                assert [each for each in purposes if each.startswith("claim")] == []
        await send(broker)


@pytest.mark.parametrize("payload", ["nonsense", "5", '{"probe": 1}x', "[]"])
async def test_whatever_is_told_does_no_harm(payload: str, brokers: Brokers) -> None:
    """Anybody may send anything; what cannot be understood is a reason to look, but for probes."""
    sender = await brokers.start(notify=False)
    broker = await brokers.start(timings=UNPOLLED)
    async with waiting(broker):
        await until_healthy(broker)
        await send(sender)
        channel = models_of().config.queue_channel
        await brokers.database.fetch("SELECT pg_notify($1, $2)", channel, payload)
        if payload.startswith("{"):
            await brokers.database.fetch("SELECT pg_notify($1, '[]')", channel)
