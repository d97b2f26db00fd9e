"""Claims: who gets which tasks, in which order, how many at once, and what is given back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from taskiq_sa_pg import NotStartedError, SQLAlchemyBroker
from taskiq_sa_pg.database import Database as Connected
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
    take_ids,
    until_healthy,
)
from tests.integration.conftest import StartBroker
from tests.integration.waiters import counted_fetches


async def test_higher_priority_goes_first_and_then_the_earlier_due(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker(timings=PATIENT)
    for priority in (0, 9, 5):
        for number in range(3):
            await send(broker, f"{priority}-{number}", priority=priority)
    # Due in another order than they were sent in.
    await each_pair.change("available_at = now() - interval '1 hour'", "task_id = '5-2'")
    async with listening(broker) as messages:
        ids = await take_ids(broker, messages, 9)
    assert ids[:3] == ["9-0", "9-1", "9-2"]
    assert set(ids[3:6]) == {"5-0", "5-1", "5-2"}
    assert ids[6:] == ["0-0", "0-1", "0-2"]


async def test_of_a_priority_the_earlier_due_is_claimed_first(brokers: Brokers) -> None:
    """Whichever was sent first."""
    broker = await brokers.start(timings=PATIENT)
    await send(broker, "sent first")
    await send(broker, "due first")
    await brokers.change("available_at = now() - interval '1 hour'", "task_id = 'due first'")
    async with listening(broker) as messages:
        assert await take_ids(broker, messages, 2) == ["due first", "sent first"]


async def test_queues_have_their_turns(start_broker: StartBroker) -> None:
    """However many tasks the first has: each claim begins with another one."""
    broker = await start_broker(timings=PATIENT)
    await asyncio.gather(*[send(broker, f"many-{i}", queue_name="many") for i in range(200)])
    await asyncio.gather(*[send(broker, f"few-{i}", queue_name="few") for i in range(10)])
    await send(broker, queue_name="others")
    async with listening(broker.listening_to("many", "few")) as messages:
        ids = await take_ids(broker, messages, 40)
    assert sum(each.startswith("few") for each in ids) == 10


def claims_of(purposes: list[str]) -> int:
    return sum(each.startswith("claim tasks") for each in purposes)


async def test_claims_grow_while_all_is_consumed(start_broker: StartBroker) -> None:
    broker = await start_broker(timings=PATIENT)
    await asyncio.gather(*[send(broker) for _ in range(163)])
    with counted_fetches() as purposes:
        async with listening(broker) as messages:
            taken = await take(messages, 163)  # 1, 2, 4, 8, 16, 32, 50, 50
            assert claims_of(purposes) == 8
            await acknowledge(*taken)


async def test_claims_shrink_to_what_is_consumed(brokers: Brokers) -> None:
    broker = await brokers.start(timings=replace(UNPOLLED, unused_claim=0.05))
    await asyncio.gather(*[send(broker) for _ in range(40)])

    async def are_claimed() -> int:
        return sum(row["worker"] is not None for row in await brokers.rows())

    async with listening(broker) as messages:
        taken = await take(messages, 8)  # the last of 8 that were claimed together

        async def is_given_back() -> bool:
            return await are_claimed() == len(taken)

        await eventually(is_given_back)
        taken += await take(messages)
        await eventually(is_given_back)
        with counted_fetches() as purposes:
            taken += await take(messages, 4)
            assert claims_of(purposes) >= 2
        await eventually(is_given_back)
        await acknowledge(*taken)


@asynccontextmanager
async def waiting_for_one(broker: SQLAlchemyBroker) -> AsyncIterator[asyncio.Task[Any]]:
    """The next task of a worker that has found nothing, and polls no more."""
    async with listening(broker) as messages:
        waiting: asyncio.Task[Any] = asyncio.ensure_future(anext(messages))
        await until_healthy(broker)
        yield waiting


async def test_what_nobody_consumes_is_given_back_and_others_get_it_at_once(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """And it does not count as a delivery."""
    sender = await start_broker(notify=False)
    hoarder = await start_broker(timings=UNPOLLED)
    other = await start_broker(timings=UNPOLLED)
    async with waiting_for_one(other) as waiting, listening(hoarder) as messages:
        for _ in range(3):
            await send(sender)
        taken = await take(messages, 2)  # of the second claim one is left
        async with asyncio.timeout(SOON):
            taken.append(await waiting)
        assert [row["deliveries"] for row in await each_pair.rows()] == [1, 1, 1]
        await acknowledge(*taken)
    assert await each_pair.rows() == []


async def test_what_is_given_back_keeps_its_place(brokers: Brokers) -> None:
    """Else it would wait for all that was sent since, again and again."""
    broker = await brokers.start(timings=replace(UNPOLLED, unused_claim=0.05))
    sent = [await send(broker, f"{i:02}") for i in range(20)]

    async def is_given_back() -> bool:
        return sum(row["worker"] is not None for row in await brokers.rows()) == 0

    async with listening(broker) as messages:
        taken = await take_ids(broker, messages, 4)  # of the third claim three are left
        await eventually(is_given_back)
        taken += await take_ids(broker, messages, 16)
    assert taken == sent


async def test_two_consumers_never_get_the_same_task(start_broker: StartBroker) -> None:
    broker, other = await start_broker(), await start_broker()
    sent = set(await asyncio.gather(*[send(broker) for _ in range(100)]))
    taken: list[str] = []

    async def consume(messages: Any) -> None:
        while len(taken) < len(sent):
            message = await anext(messages)
            taken.append(id_of(broker, message))
            if len(taken) == len(sent):
                everything.set()
            await message.ack()

    everything = asyncio.Event()
    listeners = [each.listen() for each in (broker, other, broker.listening_to("default"))]
    consuming = [asyncio.create_task(consume(each)) for each in listeners]
    async with asyncio.timeout(4 * SOON):
        await everything.wait()
    for task in consuming:
        task.cancel()
    await asyncio.wait(consuming)
    for each in listeners:
        await each.aclose()
    assert sorted(taken) == sorted(sent)


async def test_a_listener_that_is_cancelled_in_anext_loses_nothing(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """At whichever point of a claim that happens."""
    broker = await start_broker()
    sent = {await send(broker) for _ in range(3)}
    turns = 0
    taken: list[Any] = []
    while not taken:
        messages = broker.listen()
        waiting = asyncio.ensure_future(anext(messages))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError) if not waiting.done() else take_result(taken):
            message = await waiting
            taken.append(message)
        await messages.aclose()
        turns += 1 + turns // 4
        rows = await each_pair.rows()
        assert sum(row["worker"] is None for row in rows) == len(sent) - len(taken)
        assert sum(row["deliveries"] for row in rows) == len(taken)
    await acknowledge(*taken)
    async with listening(broker) as again:
        await acknowledge(*await take(again, 2))
    assert await each_pair.rows() == []


async def test_a_worker_that_stops_gives_back_what_was_not_begun(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """At once, and it does not count as a delivery; what was handed over, it keeps."""
    sender = await start_broker(notify=False)
    broker, other = await start_broker(timings=PATIENT), await start_broker(timings=UNPOLLED)
    async with waiting_for_one(other) as waiting:
        for _ in range(3):
            await send(sender)
        async with listening(broker) as messages:
            taken = await take(messages, 2)
            assert [row["worker"] is None for row in await each_pair.rows()] == [False] * 3
        async with asyncio.timeout(SOON):
            taken.append(await waiting)
        assert [row["deliveries"] for row in await each_pair.rows()] == [1, 1, 1]
        await acknowledge(*taken)
    assert await each_pair.rows() == []


async def test_a_broker_that_is_shut_down_gives_back_what_was_not_acknowledged(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """As a worker does that does not wait for its tasks to end."""
    broker = await start_broker(timings=PATIENT)
    for _ in range(3):
        await send(broker)
    messages = broker.listen()
    taken = await take(messages, 2)
    waiting = asyncio.ensure_future(anext(messages))
    taken.append(await waiting)
    waiting = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0)
    await broker.shutdown()
    with pytest.raises(NotStartedError, match="shut down while this listened"):
        await waiting
    await messages.aclose()
    rows = await each_pair.rows()
    assert [(row["worker"], row["deliveries"]) for row in rows] == [(None, 1)] * 3


async def test_a_task_that_is_sent_again_before_it_is_begun_runs_once(brokers: Brokers) -> None:
    """What was claimed of it is not handed over any more."""
    broker = await brokers.start(timings=PATIENT)
    for number in range(3):
        await send(broker, f"{number}", version=1)
    async with listening(broker) as messages:
        taken = await take(messages, 2)
        await send(broker, "2", version=2)  # it is claimed, and nobody has it yet
        taken += await take(messages)
        versions = [broker.formatter.loads(each.data).labels["version"] for each in taken]
        assert versions == ["1", "1", "2"]
        await acknowledge(*taken)
    assert await brokers.rows() == []


async def test_what_is_sent_and_claimed_by_one_process_is_renewed(
    brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its sender hears later of the commit than its consumer."""
    timings = replace(PATIENT, between_unheard_polls=0.02)
    broker = await brokers.start(notify=False, timings=timings)
    fetch = Connected.fetch

    async def is_claimed() -> bool:
        return len(broker.runtime.claims) == 1

    async def hear_late(
        self: Connected, statement: Any, given: Any, purpose: str, **options: Any
    ) -> Any:
        rows = await fetch(self, statement, given, purpose, **options)
        if purpose.startswith("send it"):
            await eventually(is_claimed)
        return rows

    monkeypatch.setattr(Connected, "fetch", hear_late)
    async with hungry(broker) as coming:
        await send(broker)
        assert await is_claimed()
        await acknowledge(await coming)
    assert await brokers.rows() == []


class take_result:  # noqa: N801 - it stands beside pytest.raises
    """Where the task was there already, nothing is raised."""

    def __init__(self, _: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
