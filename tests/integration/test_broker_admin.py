"""What people look at and do in a queue: its depth, parked tasks and schedules."""

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from taskiq.serializers import PickleSerializer

from taskiq_sa_pg import (
    ConfigurationError,
    InvalidTaskIdError,
    NotStartedError,
    ScheduleInfo,
    SQLAlchemyBroker,
)
from taskiq_sa_pg.broker import admin
from taskiq_sa_pg.broker.schedule_info import info_of_row
from taskiq_sa_pg.models import build_models
from tests.integration.brokers import (
    SOON,
    UNPOLLED,
    Brokers,
    acknowledge,
    hungry,
    id_of,
    send,
    until_healthy,
)
from tests.integration.schedulers import Schedulers, schedule

StartBroker = Callable[..., Awaitable[SQLAlchemyBroker]]


async def test_counting_stops_at_the_limit(start_broker: StartBroker, brokers: Brokers) -> None:
    """Of each priority and state: what it hides is named, and the rest is exact."""
    broker = await start_broker()
    for number in range(12):
        await send(broker, name="odd" if number % 2 else "even", priority=number % 4 // 2)
    for number in range(3):
        await send(broker, f"parked {number}", queue_name="mail")
    await send(broker, "delayed", queue_name="mail", delay=60)
    await send(broker, "running", queue_name="mail", delay=60)
    await brokers.change("worker = 'w:1'", "task_id = 'running'")
    await brokers.change("available_at = 'infinity'", "task_id LIKE 'parked%'")
    even, odd, mail = await broker.get_queues()
    assert (even.waiting, odd.waiting, mail.waiting) == (6, 6, 0)
    assert (mail.delayed, mail.running, mail.parked) == (1, 1, 3)
    assert (even.queue_name, even.task_name, odd.task_name) == ("default", "even", "odd")
    assert {each.at_least for each in (even, odd, mail)} == {()}
    assert mail.oldest_waiting is None

    even, odd, mail = await broker.get_queues(limit=4)
    assert even.waiting + odd.waiting == 8, "four of each priority"
    assert even.at_least == odd.at_least == ("waiting",)
    assert (mail.delayed, mail.running, mail.parked, mail.at_least) == (1, 1, 3, ())
    *_, mail = await broker.get_queues(limit=2)
    assert mail.at_least == ("delayed", "running", "parked")


async def test_the_oldest_is_found_behind_higher_priorities(brokers: Brokers) -> None:
    """What starves is what people look for, also where counting stops."""
    broker = await brokers.start()
    for number in range(5):
        await send(broker, name="task", priority=9 if number else 0)
    await brokers.change("available_at = now() - interval '1 hour'", "priority = 0")
    [found] = await broker.get_queues(limit=2)
    assert found.waiting == 3
    assert found.oldest_waiting is not None
    assert 3600 <= found.oldest_waiting < 3700


async def test_parked_tasks_are_listed_released_and_discarded(
    start_broker: StartBroker, brokers: Brokers
) -> None:
    broker = await start_broker(timings=UNPOLLED)
    for task_id, queue_name in (("a", "mail"), ("b", "mail"), ("c", "default"), ("d", "default")):
        await send(broker, task_id, name="two" if task_id == "d" else "task", queue_name=queue_name)
    await send(broker, "waits", delay=60)
    await brokers.change(
        "available_at = 'infinity', deliveries = 6, worker = 'w:1'", "task_id <> 'waits'"
    )

    async def ids(**chosen: Any) -> list[str]:
        return [each.task_id for each in await broker.get_parked(**chosen)]

    assert await ids() == ["a", "b", "c", "d"]
    assert await ids(limit=1) == ["a"]
    assert await ids(queue_name="mail") == ["a", "b"]
    assert await ids(task_name="two") == ["d"]
    assert await ids(queue_name="mail", task_name="two") == []
    [first] = await broker.get_parked(limit=1)
    assert (first.deliveries, first.worker, first.queue_name) == (5, "w:1", "mail")
    assert first.queued_at.tzinfo == UTC

    assert await broker.release_parked([]) == 0
    assert await broker.discard_parked(["waits", "unknown"]) == 0
    async with hungry(broker) as coming:
        await until_healthy(broker)
        assert await broker.release_parked(iter(["c", "waits"])) == 1
        async with asyncio.timeout(SOON):
            message = await coming
        assert id_of(broker, message) == "c", "a worker was told"
        await acknowledge(message)
    assert await broker.discard_parked(queue_name="mail") == 2
    assert await ids() == ["d"]
    assert await broker.discard_parked() == 1
    assert [row["task_id"] for row in await brokers.rows()] == ["waits"]


async def test_what_cannot_be_asked_for_is_refused(brokers: Brokers) -> None:
    broker = brokers.make()
    with pytest.raises(NotStartedError, match="the broker is not started"):
        await broker.get_queues()
    await broker.startup()
    for limit in (0, True, 1.5):
        for method in (broker.get_queues, broker.get_parked, broker.get_schedules):
            with pytest.raises(ConfigurationError, match="limit must be a whole number"):
                await method(limit=limit)  # type: ignore[arg-type]
    for change in (broker.release_parked, broker.discard_parked):
        with pytest.raises(TypeError, match=r"_parked\(\) takes several tasks, not one str"):
            await change("a")
        with pytest.raises(ConfigurationError, match="do not pass task_ids as"):
            await change(["a"], task_name="task")
        with pytest.raises(InvalidTaskIdError):
            await change(["a\x00"])
        with pytest.raises(ConfigurationError, match=r"queue_name 'a.x00' contains"):
            await change(queue_name="a\x00")
    for name in ("\ud800", "x" * 1_000_000, b"x"):
        with pytest.raises(ConfigurationError, match=r"^task_name "):
            await broker.get_parked(task_name=name)  # type: ignore[arg-type]
    assert await broker.get_parked("''; DROP TABLE", limit=10**30) == []
    assert await broker.get_queues(10**30) == []


async def test_schedules_are_listed_with_their_next_tick(schedulers: Schedulers) -> None:
    """Of all kinds; one that was due once and comes from a label is over."""
    at = datetime(2126, 3, 4, 12, 0, tzinfo=UTC)
    scheduler = await schedulers.start()
    broker, source = scheduler.broker, scheduler.source
    given = {"labels": {"tenant": 7}, "args": [1, "<b>"], "kwargs": {"deep": {"x": None}}}
    await source.add_schedule(schedule("cron", cron="30 6 * * *", cron_offset="Europe/Berlin"))
    await source.add_schedule(schedule("interval", interval=timedelta(minutes=10), **given))
    await source.add_schedule(schedule("time", time=at))
    await schedulers.database.fetch(
        "INSERT INTO taskiq_results_schedules (schedule_id, task_name, cron, message, is_labelled) "
        "VALUES ('written by hand', 'a', 'no cron', 'no json', true)"
    )
    by_hand, cron, interval, time = await broker.get_schedules()
    assert (by_hand.schedule_id, by_hand.task_name) == ("written by hand", "a")
    assert (by_hand.args, by_hand.kwargs, by_hand.labels, by_hand.next_due) == (None,) * 4
    assert by_hand.is_labelled
    assert not cron.is_labelled
    assert (cron.cron, cron.cron_offset, cron.args) == ("30 6 * * *", "Europe/Berlin", ["you"])
    assert cron.next_due is not None
    assert cron.next_due.strftime("%M %Z") == "30 UTC"
    assert timedelta(0) < cron.next_due - datetime.now(UTC) < timedelta(days=1)
    assert (interval.interval, interval.last_tick) == (timedelta(minutes=10), None)
    assert interval.next_due is not None
    assert abs(interval.next_due - datetime.now(UTC)) < timedelta(minutes=1), "due at once"
    assert {name: getattr(interval, name) for name in given} == given
    assert (time.time, time.next_due) == (at, at)
    await schedulers.database.fetch(
        "UPDATE taskiq_results_schedules SET last_tick = $1, is_labelled = true", at
    )
    _, cron, interval, time = await broker.get_schedules()
    assert interval.next_due == at + timedelta(minutes=10)
    assert cron.next_due is not None
    assert cron.next_due > at, "this minute was sent"
    assert time.next_due is None
    await schedulers.database.fetch(
        "UPDATE taskiq_results_schedules SET interval = interval '10000 years' "
        "WHERE schedule_id = 'interval'"
    )
    assert (await broker.get_schedules())[2].next_due is None, "not before the year 9999 ends"
    assert [each.schedule_id for each in await broker.get_schedules(limit=1)] == ["written by hand"]


async def test_many_schedules_leave_time_for_others(
    schedulers: Schedulers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of expressions that are due once a year."""
    broker = (await schedulers.start()).broker
    await schedulers.database.fetch(
        "INSERT INTO taskiq_results_schedules (schedule_id, task_name, cron, message) "
        "SELECT number, 'remind', '0 9 ' || 1 + number % 28 || ' 1 *', '{\"cron_offset\": null}' "
        "FROM generate_series(1, 200) number"
    )
    turn, turns = 0, []

    def noted(row: Any) -> ScheduleInfo:
        turns.append(turn)
        return info_of_row(row)

    monkeypatch.setattr(admin, "info_of_row", noted)
    reading = asyncio.create_task(broker.get_schedules())
    while not reading.done():
        await asyncio.sleep(0)
        turn += 1
    assert all(each.next_due is not None for each in reading.result())
    assert len(set(turns)) == 200


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


async def test_nothing_of_a_schedule_is_unpickled(schedulers: Schedulers) -> None:
    def prepare(broker: SQLAlchemyBroker) -> None:
        broker.with_serializer(PickleSerializer())

    scheduler = await schedulers.start(prepare)
    await scheduler.source.add_schedule(schedule("zone", cron="* * * * *", cron_offset="UTC"))
    await schedulers.database.fetch(
        "INSERT INTO taskiq_results_schedules (schedule_id, task_name, interval, message) "
        "VALUES ('bomb', 'b', interval '1 s', $1)",
        pickle.dumps({"args": [_Bomb()]}),
    )
    found: dict[str, ScheduleInfo] = {
        each.schedule_id: each for each in await scheduler.broker.get_schedules()
    }
    assert found["bomb"].args is None
    assert found["bomb"].next_due is not None
    assert found["zone"].next_due is None, "its zone is in the message"


async def test_without_a_table_of_schedules_the_remedy_is_told(brokers: Brokers) -> None:
    models = replace(build_models(queue=True), Schedule=None)
    broker = await brokers.start(models=models)
    with pytest.raises(ConfigurationError, match="the models have no table of schedules"):
        await broker.get_schedules()
