"""Leases: what a worker has is its own as long as it renews it, and nobody's afterwards."""

import asyncio
from typing import Any

import pytest

from taskiq_sa_pg.statements import (
    acknowledge_claims,
    claim_tasks,
    park_claims,
    release_claims,
    renew_claims,
)
from tests.conftest import eventually
from tests.integration.brokers import (
    PATIENT,
    Brokers,
    acknowledge,
    listening,
    models_of,
    send,
    take,
)
from tests.integration.conftest import StartBroker
from tests.integration.waiters import counted_fetches


async def until_renewed(purposes: list[str], times: int) -> None:
    async def is_renewed() -> bool:
        return sum(each.startswith("renew the leases") for each in purposes) >= times

    await eventually(is_renewed)


async def test_a_task_is_renewed_for_as_long_as_it_takes(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker(timings=PATIENT, lease=0.9)
    await send(broker, "long")
    with counted_fetches() as purposes:
        async with listening(broker) as messages:
            [message] = await take(messages)
            await until_renewed(purposes, 4)  # 1.2 s
            assert 0 < await each_pair.seconds_until_due("long") <= 0.9
            await acknowledge(message)
    assert await each_pair.rows() == []


async def test_what_a_dead_worker_had_is_delivered_when_its_lease_ends(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """To a worker that waits for nothing else; and the lease is not renewed by then."""
    dead, other = await start_broker(timings=PATIENT), await start_broker(timings=PATIENT)
    await send(dead)
    async with listening(dead) as messages:
        lost = await take(messages)
        # As if it had been claimed a lease before, and nothing were to come for a worker but this.
        await each_pair.change("available_at = now() + interval '0.3 s'")
        async with listening(other) as others:
            [message] = await take(others)
            [row] = await each_pair.rows()
            assert row["deliveries"] == 2
            await acknowledge(message)
    assert await each_pair.rows() == []
    del lost


async def test_a_lost_claim_neither_acknowledges_nor_renews(
    start_broker: StartBroker, each_pair: Brokers, caplog: pytest.LogCaptureFixture
) -> None:
    late = await start_broker(timings=PATIENT, lease=0.3)
    other = await start_broker(timings=PATIENT)
    await send(late, "task-1")
    async with listening(late) as messages, listening(other) as others:
        [lost] = await take(messages)
        # Between two renewals: another one claims it.
        await each_pair.change("available_at = now(), claim = claim + 1")
        [message] = await take(others)
        [before] = await each_pair.rows()
        with counted_fetches() as purposes:
            await until_renewed(purposes, 2)
        await acknowledge(lost)
        assert await each_pair.rows() == [before]
        assert "task task-1: its lease of 0.3 s was lost" in caplog.text
        await acknowledge(message)
    assert await each_pair.rows() == []


async def test_a_claim_holds_nothing_of_an_id_that_was_used_before(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    late, other = await start_broker(timings=PATIENT), await start_broker(timings=PATIENT)
    await send(late, "order-1")
    async with listening(late) as messages, listening(other) as others:
        [lost] = await take(messages)
        await each_pair.expire()
        await acknowledge(*await take(others))
        assert await each_pair.rows() == []
        await send(other, "order-1")
        [again] = await take(others)
        await acknowledge(lost)
        assert len(await each_pair.rows()) == 1
        await acknowledge(again)
    assert await each_pair.rows() == []


async def test_the_same_worker_may_get_what_it_has_lost(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """The later delivery is the one that it holds, whatever becomes of the earlier one."""
    broker = await start_broker(timings=PATIENT)
    await send(broker, "task-1")
    async with listening(broker) as messages:
        lost = await take(messages)
        await each_pair.expire()
        [message] = await take(messages)
        await acknowledge(*lost)
        del lost
        assert len(await each_pair.rows()) == 1
        assert len(broker.runtime.claims) == 1
        await acknowledge(message)
    assert await each_pair.rows() == []


async def test_what_was_read_by_a_task_that_ended_is_not_renewed(brokers: Brokers) -> None:
    """Though somebody may keep the message; it can be acknowledged until its lease ends."""
    broker = await brokers.start(timings=PATIENT)
    await send(broker)
    async with listening(broker) as messages:
        [message] = await take(messages)

        async def read() -> bytes:
            return message.data

        assert await asyncio.create_task(read())
        await asyncio.sleep(0)  # others hear later than this of its end
        assert len(broker.runtime.claims) == 0
        await acknowledge(message)
    assert await brokers.rows() == []


class Hands:
    """Runs the queue's statements, with claims of its own."""

    def __init__(self, broker: Any) -> None:
        queue = models_of().queue_table
        assert queue is not None
        self._database = broker.runtime.database
        self._claim, self._renew = claim_tasks(queue), renew_claims(queue)
        self._release, self._park = release_claims(queue), park_claims(queue)
        self._acknowledge = acknowledge_claims(queue)

    async def claim(self) -> dict[str, Any]:
        parameters = {"size": 5, "lease": 60, "given_worker": "me"}
        pairs = {"given_queue_name": ["default"], "given_priority": [0], "given_unknown": []}
        rows = await self._database.fetch(self._claim, parameters | pairs, "claim")
        return {
            "given_task_id": [row[0] for row in rows],
            "given_claim": [row[1] for row in rows],
        }

    async def renew(self, claims: dict[str, Any]) -> None:
        await self._database.fetch(self._renew, {**claims, "lease": 600}, "renew")

    async def release(self, claims: dict[str, Any]) -> None:
        given = {**claims, "delay": 0, "undelivered": 1}
        await self._database.fetch(self._release, given, "release")

    async def park(self, claims: dict[str, Any]) -> None:
        await self._database.fetch(self._park, claims, "park")

    async def acknowledge(self, claims: dict[str, Any]) -> list[tuple[Any, int]]:
        rows = await self._database.fetch(self._acknowledge, claims, "acknowledge")
        return [tuple(row) for row in rows]


async def test_what_was_given_back_is_not_touched_by_what_comes_late(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """By a renewal under way, or by the same statement, of which nobody knew that it was done."""
    broker = await start_broker()
    hands = Hands(broker)
    await send(broker, "task-1")
    claims = await hands.claim()
    await hands.release(claims)
    [before] = await each_pair.rows()
    assert (before["deliveries"], before["worker"]) == (0, None)
    await hands.release(claims)
    await hands.renew(claims)
    assert await hands.acknowledge(claims) == []
    assert await each_pair.rows() == [before]


async def test_what_was_parked_is_not_touched_by_what_comes_late(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker()
    hands = Hands(broker)
    await send(broker, "task-1")
    claims = await hands.claim()
    await hands.park(claims)
    [before] = await each_pair.rows()
    await hands.renew(claims)
    assert await each_pair.rows() == [before]
    assert (await hands.claim())["given_task_id"] == []


async def test_of_two_claims_of_an_id_only_the_last_is_acknowledged(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker()
    hands = Hands(broker)
    await send(broker, "task-1")
    first = await hands.claim()
    await each_pair.expire()
    second = await hands.claim()
    both = {name: first[name] + second[name] for name in first}
    assert await hands.acknowledge(both) == [("task-1", second["given_claim"][0])]
