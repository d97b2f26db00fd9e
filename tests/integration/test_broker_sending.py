"""Sending tasks: what is stored of them, in how many statements, and what is refused."""

import asyncio
import uuid
from typing import Any

import pytest
from taskiq import BrokerMessage
from taskiq.exceptions import SendTaskError
from taskiq.kicker import AsyncKicker

from taskiq_sa_pg import ConfigurationError, InvalidTaskIdError, NotStartedError, StorageError
from tests.integration.brokers import PATIENT, Brokers, acknowledge, listening, send, take
from tests.integration.conftest import StartBroker
from tests.integration.waiters import counted_fetches
from tests.tasks import new_id


async def test_a_task_is_committed_when_kiq_returns(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker()
    task_id = await send(broker, queue_name="mail", priority=3)
    [row] = await each_pair.rows()
    assert row["task_id"] == task_id
    assert (row["queue_name"], row["priority"], row["task_name"]) == ("mail", 3, "task")
    assert (row["worker"], row["deliveries"]) == (None, 0)
    assert row["available_at"] == row["queued_at"]
    assert broker.formatter.loads(row["message"]).task_id == task_id


async def test_a_hundred_at_once_share_few_statements(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker()
    with counted_fetches() as purposes:
        sent = await asyncio.gather(*[send(broker) for _ in range(100)])
    assert {row["task_id"] for row in await each_pair.rows()} == set(sent)
    assert len(purposes) <= 5


async def test_what_one_sender_does_wrong_is_nobody_elses(brokers: Brokers) -> None:
    """Of those that share a statement only the one that PostgreSQL refuses fails."""
    broker = await brokers.start()
    bad = [send(broker, name="a\x00b"), send(broker, name="\x00")]
    outcomes = await asyncio.gather(
        *[send(broker) for _ in range(20)], *bad, return_exceptions=True
    )
    assert [type(each) for each in outcomes[20:]] == [SendTaskError, SendTaskError]
    assert all(isinstance(each.__cause__, StorageError) for each in outcomes[20:])  # type: ignore[union-attr]
    assert {row["task_id"] for row in await brokers.rows()} == set(outcomes[:20])


@pytest.mark.parametrize("delay", [2, 2.5, "2", "2.5"], ids=repr)
async def test_a_delay_is_a_number_of_seconds_in_any_form(delay: Any, brokers: Brokers) -> None:
    broker = await brokers.start()
    task_id = await send(broker, delay=delay, priority="9")
    [row] = await brokers.rows()
    assert (row["available_at"] - row["queued_at"]).total_seconds() == float(delay)
    assert row["priority"] == 9
    assert await brokers.seconds_until_due(task_id) <= float(delay)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("priority", "10"),
        ("priority", -1),
        ("priority", 1.5),
        ("priority", "high"),
        ("delay", -0.1),
        ("delay", "soon"),
        ("delay", float("nan")),
        ("delay", "inf"),
        ("delay", 1e11),
        ("queue_name", ""),
        ("queue_name", "a\x00b"),
    ],
)
async def test_a_label_that_cannot_work_is_named(label: str, value: Any, brokers: Brokers) -> None:
    broker = await brokers.start()
    with pytest.raises(SendTaskError) as caught:
        await send(broker, **{label: value})
    assert isinstance(caught.value.__cause__, ConfigurationError)
    assert f"the label {label} must be " in str(caught.value.__cause__)
    assert await brokers.rows() == []


@pytest.mark.parametrize("kind", ["VarChar", "Text", "Uuid"])
async def test_task_ids_of_each_type_travel_and_bad_ones_are_refused(
    kind: Any, brokers: Brokers
) -> None:
    broker = await brokers.start(field_for_task_id=kind, timings=PATIENT)
    ids = [new_id() for _ in range(3)]
    await asyncio.gather(*[send(broker, each) for each in ids])
    stored = [row["task_id"] for row in await brokers.rows(kind)]
    assert sorted(stored, key=str) == sorted(
        [uuid.UUID(i) if kind == "Uuid" else i for i in ids], key=str
    )
    bad = "not a uuid" if kind == "Uuid" else "a\x00b"
    with pytest.raises(SendTaskError) as caught:
        await send(broker, bad)
    assert isinstance(caught.value.__cause__, InvalidTaskIdError)
    async with listening(broker) as messages:
        await acknowledge(*await take(messages, 3))
    assert await brokers.rows(kind) == []


async def test_an_id_that_waits_stays_as_it_is(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker()
    await send(broker, "order-1", priority=1)
    [before] = await each_pair.rows()
    await send(broker, "order-1", priority=2, delay=50)
    assert await each_pair.rows() == [before]


async def test_an_id_that_a_worker_has_is_replaced(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    """And the acknowledgement of the old delivery removes nothing, as a retry wants it."""
    broker = await start_broker(timings=PATIENT)
    await send(broker, "order-1")
    async with listening(broker) as messages:
        [old] = await take(messages)
        [claimed] = await each_pair.rows()
        await send(broker, "order-1", priority=2)
        [row] = await each_pair.rows()
        assert (row["priority"], row["worker"], row["deliveries"]) == (2, None, 0)
        assert row["claim"] == claimed["claim"] + 1
        await acknowledge(old)
        assert await each_pair.rows() == [row]
        [new] = await take(messages)
        assert broker.formatter.loads(new.data).labels["priority"] == "2"
        await acknowledge(new)
    assert await each_pair.rows() == []
    assert "lease" not in caplog.text


async def test_of_two_sends_of_an_id_in_one_batch_the_first_stays(brokers: Brokers) -> None:
    broker = await brokers.start()
    # The first goes alone; the other two gather.
    await asyncio.gather(
        send(broker),
        send(broker),
        send(broker, "order-1", priority=1),
        send(broker, "order-1", priority=2),
    )
    rows = {row["task_id"]: row["priority"] for row in await brokers.rows()}
    assert len(rows) == 3
    assert rows["order-1"] == 1


async def test_nothing_is_sent_before_startup_nor_after_shutdown(brokers: Brokers) -> None:
    broker = brokers.make()
    with pytest.raises(SendTaskError) as caught:
        await send(broker)
    assert isinstance(caught.value.__cause__, NotStartedError)
    assert "broker.startup()" in str(caught.value.__cause__)
    await broker.startup()
    await broker.shutdown()
    with pytest.raises(SendTaskError) as caught:
        await send(broker)
    assert isinstance(caught.value.__cause__, NotStartedError)


async def test_another_event_loop_is_told_what_mends_it(brokers: Brokers) -> None:
    broker = await brokers.start()
    with pytest.raises(SendTaskError) as caught:
        await asyncio.to_thread(asyncio.run, send(broker))
    assert isinstance(caught.value.__cause__, NotStartedError)
    assert "on another event loop" in str(caught.value.__cause__)
    await send(broker)


async def test_a_direct_kick_has_the_same_checks(brokers: Brokers) -> None:
    """As Context.requeue() does it."""
    broker = await brokers.start()
    message = BrokerMessage(task_id=new_id(), task_name="task", message=b"", labels={})
    await broker.kick(message)
    message.labels["queue_name"] = 5
    with pytest.raises(ConfigurationError, match="the label queue_name must be"):
        await broker.kick(message)


async def test_a_cancelled_sender_takes_nobody_along(brokers: Brokers) -> None:
    broker = await brokers.start()
    sending = [asyncio.create_task(send(broker)) for _ in range(10)]
    await asyncio.sleep(0)
    sending[4].cancel()
    outcomes = await asyncio.gather(*sending, return_exceptions=True)
    assert isinstance(outcomes[4], asyncio.CancelledError)
    stored = {row["task_id"] for row in await brokers.rows()}
    assert stored >= {each for each in outcomes if isinstance(each, str)}


async def test_a_kicker_sends_to_the_broker_that_it_was_given(brokers: Brokers) -> None:
    """A view of it, too."""
    broker = await brokers.start(queue_name="orders")
    kicker: AsyncKicker[Any, Any] = AsyncKicker("task", broker, {})
    await kicker.with_broker(broker.listening_to("mail")).kiq()
    [row] = await brokers.rows()
    assert row["queue_name"] == "orders"  # what a worker listens to says nothing of the sender
