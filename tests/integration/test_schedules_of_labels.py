"""Schedules in the labels of tasks: they are stored at startup, and go with their labels."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from taskiq import async_shared_broker

from taskiq_sa_pg import ConfigurationError, SQLAlchemyBroker
from tests.integration.schedulers import NOON, Schedulers, greet, look_at_once, schedule

CRON = {"cron": "0 12 * * *", "args": ["you"]}
OTHER = {"interval": 3600, "args": ["me"], "labels": {"priority": 5}}


def with_task(
    *schedules: dict[str, Any], name: str = "labelled", **labels: Any
) -> Callable[[SQLAlchemyBroker], object]:
    """Gives a broker a task with these schedules in its labels."""
    return lambda broker: broker.register_task(greet, name, schedule=list(schedules), **labels)


async def test_labels_are_stored_once_and_keep_their_ticks(schedulers: Schedulers) -> None:
    prepare = with_task(CRON, OTHER, CRON, priority=2)
    several = await asyncio.gather(*(schedulers.start(prepare) for _ in range(3)))
    schedulers.set_now(NOON)
    await look_at_once(several, NOON)
    before = await schedulers.stored()
    assert len(before) == 3  # two of them alike
    assert all(row["is_labelled"] and row["last_tick"] for row in before.values())
    query = "SELECT priority FROM taskiq_results_queue ORDER BY priority"
    assert [row[0] for row in await schedulers.database.fetch(query)] == [2, 2, 5]
    [again] = await asyncio.gather(schedulers.start(prepare))
    assert await schedulers.stored() == before
    await look_at_once([again], NOON)
    assert len(await schedulers.sent()) == 3


async def test_labels_that_changed_are_replaced_and_those_that_went_are_deleted(
    schedulers: Schedulers,
) -> None:
    first = await schedulers.start(with_task(CRON, OTHER))
    await first.source.add_schedule(schedule("added", cron="1 1 1 1 *", task_name="labelled"))
    schedulers.set_now(NOON)
    await look_at_once([first], NOON)
    before = await schedulers.stored()
    second = await schedulers.start(with_task({**CRON, "args": ["all"]}, {**OTHER, "interval": 60}))
    found = {each.cron or each.interval: each for each in await second.source.get_schedules()}
    assert set(found) == {"0 12 * * *", timedelta(minutes=1), "1 1 1 1 *"}
    kept = found["0 12 * * *"]
    assert kept.args == ["all"]
    after = await schedulers.stored()
    assert after[kept.schedule_id]["last_tick"] == before[kept.schedule_id]["last_tick"] == NOON
    assert after[kept.schedule_id]["created_at"] == before[kept.schedule_id]["created_at"]
    await schedulers.start()
    assert set(await schedulers.stored()) == {"added"}


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_who_may_not_have_all_tasks_deletes_schedules_of_its_own_only(
    schedulers: Schedulers,
) -> None:
    await schedulers.start(
        lambda broker: [with_task(CRON, name=name)(broker) for name in ("mine", "theirs")]
    )

    def as_in_an_application(broker: SQLAlchemyBroker) -> None:
        broker.is_scheduler_process = False
        with_task(name="mine")(broker)

    await schedulers.start(as_in_an_application)
    assert [row["task_name"] for row in (await schedulers.stored()).values()] == ["theirs"]


async def test_a_time_in_a_label_is_sent_once_however_often_it_is_stored(
    schedulers: Schedulers,
) -> None:
    naive = NOON.replace(tzinfo=None)
    for _ in range(2):
        each = await schedulers.start(with_task({"time": naive, "args": ["you"]}))
        await look_at_once([each], NOON)
        await each.update()
        assert each.due(NOON + timedelta(days=1)) == []
        assert len(await schedulers.sent()) == 1
    each = await schedulers.start(with_task({"time": naive + timedelta(days=1)}))
    await look_at_once([each], NOON + timedelta(days=1))
    assert len(await schedulers.sent()) == 2


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_an_id_in_a_label_is_used_but_nobody_else_s_schedule_is_touched(
    schedulers: Schedulers,
) -> None:
    first = await schedulers.start(with_task({**CRON, "schedule_id": "mine"}))
    [task] = await first.source.get_schedules()
    assert task.schedule_id == "mine"
    await first.source.add_schedule(schedule("mine", interval=5))
    await schedulers.start(with_task({**CRON, "schedule_id": "mine"}))
    await schedulers.start()
    [task] = await first.source.get_schedules()
    assert (task.interval, task.cron) == (timedelta(seconds=5), None)


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_tasks_of_views_have_schedules_and_those_of_other_brokers_have_not(
    schedulers: Schedulers, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare(broker: SQLAlchemyBroker) -> None:
        with_task(CRON, name="viewed")(broker.listening_to("mail"))  # type: ignore[arg-type]

    shared = async_shared_broker.register_task(greet, "shared", schedule=[CRON])
    try:
        await schedulers.start(prepare)
    finally:
        del async_shared_broker.global_task_registry[shared.task_name]
    assert [row["task_name"] for row in (await schedulers.stored()).values()] == ["viewed"]
    assert "labels of task shared are ignored: it has another broker" in caplog.text


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_a_label_that_cannot_work_ends_the_startup(schedulers: Schedulers) -> None:
    refused = {
        "cron expression 'never'": [{"cron": "never"}],
        "Interval must be at least 1 second": [{"interval": 0}],
        "must have one of|must have exactly one of": [
            {"interval": 1, "time": datetime.now().astimezone()}
        ],
        "two schedules in labels have the schedule_id 'a'": [{**CRON, "schedule_id": "a"}] * 2,
    }
    for text, schedules in refused.items():
        with pytest.raises(ConfigurationError, match=text):
            await schedulers.start(with_task(*schedules))
    each = await schedulers.start(with_task({"args": ["of no time"]}))  # which taskiq leaves out
    assert await each.source.get_schedules() == []
