"""Connections that are cut while a worker waits, claims or acknowledges: it goes on by itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import pytest

from taskiq_sa_pg import StorageError
from tests.conftest import eventually
from tests.integration.brokers import (
    PATIENT,
    SOON,
    UNPOLLED,
    Brokers,
    acknowledge,
    hungry,
    id_of,
    listening,
    send,
    take,
    until_healthy,
)
from tests.integration.conftest import StartBroker


async def cut(brokers: Brokers, state: str = "%") -> None:
    """Has the server close our sessions."""
    await brokers.database.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = $1 AND state LIKE $2",
        *(brokers.name, state),
    )


@asynccontextmanager
async def locked(brokers: Brokers) -> AsyncIterator[None]:
    """Nobody reads or changes the queue meanwhile: statements stand still."""
    other = await asyncpg.connect(brokers.database.direct_dsn)
    try:
        async with other.transaction():
            await other.execute(f"LOCK TABLE {brokers.queue}")
            yield
    finally:
        await other.close()


async def until_active(brokers: Brokers) -> None:
    async def is_active() -> bool:
        return "active" in await brokers.database.sessions(brokers.name)

    await eventually(is_active)


async def test_a_worker_that_waits_goes_on(start_broker: StartBroker, each_pair: Brokers) -> None:
    """It listens again, and is told of what comes then."""
    broker = await start_broker(timings=UNPOLLED)
    async with hungry(broker) as coming:
        await until_healthy(broker)
        listener = broker.runtime.listener
        assert listener is not None
        await cut(each_pair)

        async def is_noticed() -> bool:
            return not listener.is_healthy

        await eventually(is_noticed)
        await until_healthy(broker)
        task_id = await send(broker)
        async with asyncio.timeout(SOON):
            message = await coming
        assert id_of(broker, message) == task_id
        await acknowledge(message)


async def test_what_came_while_it_did_not_hear_is_noticed(brokers: Brokers) -> None:
    sender = await brokers.start(notify=False)
    broker = await brokers.start(timings=UNPOLLED)
    async with hungry(broker) as coming:
        await until_healthy(broker)
        await send(sender)  # which tells nobody
        await cut(brokers)
        async with asyncio.timeout(SOON):
            await acknowledge(await coming)


async def test_a_claim_that_is_cut_is_made_again(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker(timings=PATIENT)
    sent = {await send(broker) for _ in range(3)}
    async with listening(broker) as messages:
        async with locked(each_pair):
            first = asyncio.ensure_future(anext(messages))
            await until_active(each_pair)
            await cut(each_pair, "active")
        async with asyncio.timeout(2 * SOON):
            taken = [await first, *await take(messages, 2)]
        assert {id_of(broker, each) for each in taken} == sent
        await acknowledge(*taken)
    assert await each_pair.rows() == []


async def test_an_acknowledgement_that_is_cut_is_made_again(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker(timings=PATIENT)
    await send(broker)
    async with listening(broker) as messages:
        [message] = await take(messages)
        async with locked(each_pair):
            ending = asyncio.create_task(acknowledge(message))
            await until_active(each_pair)
            await cut(each_pair, "active")
        async with asyncio.timeout(SOON):
            await ending
    assert await each_pair.rows() == []


async def test_what_cannot_be_acknowledged_is_named_by_its_task_id(brokers: Brokers) -> None:
    broker = await brokers.start(timings=PATIENT, command_timeout=0.3, retry_timeout=0)
    await send(broker, "mine")
    async with listening(broker) as messages:
        [message] = await take(messages)
        async with locked(brokers):
            with pytest.raises(StorageError, match=r"^task 'mine': cannot acknowledge it"):
                await acknowledge(message)
        await acknowledge(message)


async def test_a_renewal_that_is_cut_is_made_again(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker(timings=PATIENT, lease=3)
    await send(broker, "long")
    async with listening(broker) as messages:
        [message] = await take(messages)
        async with locked(each_pair):
            await until_active(each_pair)  # after a third of the lease
            await cut(each_pair, "active")

        async def is_renewed() -> bool:
            return await each_pair.seconds_until_due("long") > 2.1

        await eventually(is_renewed, 2)
        await acknowledge(message)


async def test_a_renewal_that_has_failed_is_made_again_at_once(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """A pause after it would let the lease end, although PostgreSQL is back."""
    broker = await start_broker(timings=PATIENT, lease=3)
    await send(broker, "long")
    async with listening(broker) as messages:
        [message] = await take(messages)
        async with locked(each_pair):
            await until_active(each_pair)
            await asyncio.sleep(1.2)  # it is tried for a third of the lease

        async def is_renewed() -> bool:
            return await each_pair.seconds_until_due("long") > 2.1

        await eventually(is_renewed, 0.6)
        await acknowledge(message)


async def test_a_worker_that_is_stopped_in_an_outage_ends_soon(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """What it cannot give back comes back when its lease ends."""
    broker = await start_broker(timings=replace(PATIENT, end_of_claim=0.2))
    for number in range(3):
        await send(broker, f"{number}")
    async with listening(broker) as messages:
        _ = await take(messages, 2)  # of the second claim one is left
        async with locked(each_pair), asyncio.timeout(SOON):
            await messages.aclose()
            await broker.shutdown()
    assert [row["deliveries"] for row in await each_pair.rows()] == [1, 1, 1]


async def test_a_shutdown_that_is_cancelled_ends_the_listening(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """As taskiq's worker cancels it after 5 seconds."""
    broker = await start_broker(timings=PATIENT)
    await send(broker)
    async with listening(broker) as messages:
        _ = await take(messages)
        await until_healthy(broker)
        listener = broker.runtime.listener
        assert listener is not None
        async with locked(each_pair):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(broker.shutdown(), 0.3)
        assert listener.state == "idle"


async def test_a_worker_whose_tasks_are_all_cancelled_goes_on(brokers: Brokers) -> None:
    """It listens again."""
    broker = await brokers.start()
    async with hungry(broker) as coming:
        await until_healthy(broker)
        others = asyncio.all_tasks() - {asyncio.current_task(), coming}
        for each in others:
            each.cancel()
        await asyncio.wait(others)
        await until_healthy(broker)
        task_id = await send(broker)
        async with asyncio.timeout(SOON):
            message = await coming
        assert id_of(broker, message) == task_id
        await acknowledge(message)


async def test_what_is_sent_while_connections_are_cut_is_sent(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker()
    await send(broker, "before")
    async with locked(each_pair):
        sending = [asyncio.create_task(send(broker, f"{i}")) for i in range(20)]
        await until_active(each_pair)
        await cut(each_pair, "active")
    await asyncio.gather(*sending)
    assert len(await each_pair.rows()) == 21


async def test_a_worker_says_once_that_it_cannot_claim_and_goes_on(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    """For as long as it takes: longer than statements are tried again."""
    timings = replace(UNPOLLED, between_unheard_polls=0.05)
    broker = await start_broker(timings=timings, retry_timeout=0)
    other_name = each_pair.queue.replace("_queue", "_gone")
    await send(broker)
    await each_pair.database.fetch(f"ALTER TABLE {each_pair.queue} RENAME TO {other_name}")
    try:
        async with hungry(broker) as coming:

            async def is_told() -> bool:
                return "no tasks can be claimed" in caplog.text

            await eventually(is_told)
            await cut(each_pair)
            await each_pair.database.fetch(f"ALTER TABLE {other_name} RENAME TO {each_pair.queue}")
            async with asyncio.timeout(2 * SOON):
                await acknowledge(await coming)
    finally:
        await each_pair.database.fetch(
            f"ALTER TABLE IF EXISTS {other_name} RENAME TO {each_pair.queue}"
        )
    assert caplog.text.count("no tasks can be claimed") == 1
