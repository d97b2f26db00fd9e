"""SQLAlchemyScheduleSource: schedules are kept, and each tick is sent once, whoever looks."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta, timezone

import pytest
from taskiq import InMemoryBroker
from taskiq.scheduler.scheduled_task import CronSpec

from taskiq_sa_pg import (
    ConfigurationError,
    InvalidTaskIdError,
    Models,
    NotStartedError,
    SQLAlchemyBroker,
    SQLAlchemyScheduleSource,
    build_models,
)
from tests.integration.schedulers import NOON, Schedulers, look_at_once, schedule

HOUR = timedelta(hours=1)


async def test_schedules_come_back_as_they_were_added(schedulers: Schedulers) -> None:
    source = (await schedulers.start()).source
    time = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone(timedelta(hours=2)))
    rich = {"args": [1, "ü", [None]], "kwargs": {"b": {"c": 0.5}}, "labels": {"priority": 3}}
    added = {
        "cron": schedule("cron", cron="*/5 * * * mon", cron_offset="Europe/Berlin", **rich),
        "offset": schedule("offset", cron="0 1 1 1 *", cron_offset=timedelta(hours=-3)),
        "interval": schedule("interval", interval=timedelta(days=40), task_id="mine"),
        "seconds": schedule("seconds", interval=90),
        "time": schedule("time", time=time, task_id="1" * 32),
        "naive": schedule("naive", time=datetime(2026, 1, 2)),  # noqa: DTZ001 - which is UTC
    }
    for each in added.values():
        await source.add_schedule(each)
    found = {each.schedule_id: each for each in await source.get_schedules()}
    added["seconds"].interval = timedelta(seconds=90)
    added["naive"].time = datetime(2026, 1, 2, tzinfo=UTC)
    assert found == added
    assert not any(row["is_labelled"] for row in (await schedulers.stored()).values())


async def test_taskiq_s_own_methods_schedule_and_unschedule(schedulers: Schedulers) -> None:
    each = await schedulers.start()
    task, source = each.broker.find_task("greet"), each.source
    assert task is not None
    created = [
        await task.schedule_by_cron(source, CronSpec(minutes=5, offset=timedelta(hours=1)), "a"),
        await task.schedule_by_interval(source, 3600, "b"),
        await task.schedule_by_time(source, NOON, name="c"),
        await task.kicker().with_schedule_id("own").schedule_by_interval(source, HOUR, "d"),
    ]
    found = {schedule.schedule_id: schedule for schedule in await source.get_schedules()}
    assert set(found) == {one.schedule_id for one in created}
    assert found["own"].args == ["d"]
    assert found[created[0].schedule_id].cron_offset == timedelta(hours=1)
    for one in created[1:]:
        await one.unschedule()
    assert [one.schedule_id for one in await source.get_schedules()] == [created[0].schedule_id]


async def test_a_minute_of_a_cron_expression_is_sent_once(schedulers: Schedulers) -> None:
    several = [await schedulers.start() for _ in range(3)]
    await several[0].source.add_schedule(schedule(cron="* 12 * * *", task_id="t"))
    await several[0].source.add_schedule(schedule("b", cron="1 8 * * *", cron_offset="Asia/Tokyo"))
    for second in (0, 1, 59):
        schedulers.set_now(NOON.replace(second=second))
        await look_at_once(several, NOON.replace(second=second))
    assert await schedulers.sent() == ["t"]
    await schedulers.database.fetch("DELETE FROM taskiq_results_queue")
    several.append(await schedulers.start())  # as after a restart: it remembers nothing
    schedulers.set_now(NOON)
    await look_at_once(several[3:], NOON)
    assert await schedulers.sent() == []
    later = NOON + timedelta(minutes=1)
    schedulers.set_now(later)
    await look_at_once(several, later)
    assert await schedulers.sent() == ["t"]
    schedulers.set_now(NOON.replace(hour=23, minute=1))
    await look_at_once(several, NOON.replace(hour=23, minute=1))
    assert len(await schedulers.sent()) == 2  # that of 8:01 in Tokyo


async def test_a_minute_that_ends_before_it_is_sent_is_not_the_next_one(
    schedulers: Schedulers,
) -> None:
    first, second = [await schedulers.start() for _ in range(2)]
    await first.source.add_schedule(schedule(cron="0 12 * * *"))
    schedulers.set_now(NOON)
    await look_at_once([first], NOON)
    await second.update()
    [late] = second.due(NOON.replace(second=59))
    schedulers.set_now(NOON + timedelta(minutes=1))  # its event loop was busy
    await second.scheduler.on_ready(second.source, late)
    assert len(await schedulers.sent()) == 1


async def test_an_interval_is_sent_once_whatever_the_phases(schedulers: Schedulers) -> None:
    several = [await schedulers.start() for _ in range(3)]
    await several[0].source.add_schedule(schedule(interval=HOUR))
    await look_at_once(several, NOON)
    assert len(await schedulers.sent()) == 1
    restarted = [await schedulers.start() for _ in range(2)]
    await schedulers.let_pass("30 min")
    await look_at_once(restarted, NOON + HOUR / 2)
    assert len(await schedulers.sent()) == 1  # not due yet
    await schedulers.let_pass("30 min")
    await look_at_once(several + restarted, NOON + HOUR)
    assert len(await schedulers.sent()) == 2


async def test_after_a_restart_an_interval_is_looked_at_when_it_is_due(
    schedulers: Schedulers,
) -> None:
    first, second = [await schedulers.start() for _ in range(2)]
    await first.source.add_schedule(schedule(interval=HOUR))
    await look_at_once([first], NOON)
    await schedulers.let_pass("50 min")
    now = NOON + timedelta(minutes=50)
    await look_at_once([second], now)
    assert second.due(now + timedelta(minutes=9)) == []
    await second.update()
    assert second.due(now + timedelta(minutes=9)) == []
    await schedulers.let_pass("10 min")
    await second.look(now + timedelta(minutes=10))
    assert len(await schedulers.sent()) == 2
    [task] = await second.source.get_schedules()
    # What is left of the hour, by the clock, of which a busy machine takes a second.
    assert task.interval is not None
    assert HOUR - timedelta(seconds=30) < task.interval <= HOUR


async def test_ticks_of_an_interval_keep_their_distance(schedulers: Schedulers) -> None:
    """Neither looks that come a little late nor others that come between them change the rate."""
    each = await schedulers.start()
    await each.source.add_schedule(schedule(interval=10))
    await each.update()
    await each.look(NOON)
    query = "SELECT extract(epoch FROM last_tick - $1::timestamptz)::float AS passed"
    query += " FROM taskiq_results_schedules"
    [[started]] = await schedulers.database.fetch("SELECT last_tick FROM taskiq_results_schedules")
    await schedulers.let_pass("10.7 s")
    await each.scheduler.on_ready(each.source, (await each.source.get_schedules())[0])
    [[passed]] = await schedulers.database.fetch(query, started)
    assert passed == pytest.approx(-0.7)  # 10 after the one before
    await schedulers.let_pass("25 s")
    await each.scheduler.on_ready(each.source, (await each.source.get_schedules())[0])
    [[passed]] = await schedulers.database.fetch(query, started)
    assert passed > -0.1  # nobody made up for what was missed
    assert len(await schedulers.sent()) == 3


async def test_what_is_due_once_is_sent_once_and_late_if_need_be(schedulers: Schedulers) -> None:
    first = await schedulers.start()
    await first.source.add_schedule(schedule("past", time=NOON, task_id="p"))
    await first.source.add_schedule(schedule("next", time=NOON + HOUR, task_id="n"))
    await schedulers.stop()  # and nobody runs for a while
    several = [await schedulers.start() for _ in range(3)]
    await look_at_once(several, NOON + HOUR / 2)
    assert await schedulers.sent() == ["p"]
    assert set(await schedulers.stored()) == {"next"}
    await asyncio.gather(*(each.look(NOON + HOUR) for each in several))
    assert sorted(await schedulers.sent()) == ["n", "p"]
    assert await schedulers.stored() == {}


async def test_a_schedule_that_has_become_another_is_not_sent_for_the_old_times(
    schedulers: Schedulers,
) -> None:
    each = await schedulers.start()
    await each.source.add_schedule(schedule("cron", cron="0 12 * * *"))
    await each.source.add_schedule(schedule("time", time=NOON))
    await each.update()
    await each.source.add_schedule(schedule("cron", cron="0 13 * * *"))
    await each.source.add_schedule(schedule("time", time=NOON + HOUR))
    schedulers.set_now(NOON)
    await each.look(NOON)
    assert await schedulers.sent() == []
    schedulers.set_now(NOON + HOUR)
    for _ in range(2):  # updates, of which the first makes the loop forget what was due once
        await each.update()
    await each.look(NOON + HOUR)
    assert len(await schedulers.sent()) == 2


async def test_a_schedule_that_is_added_again_is_due_no_sooner(schedulers: Schedulers) -> None:
    each = await schedulers.start()
    for _ in range(2):  # as an application does whenever it starts
        await each.source.add_schedule(schedule(interval=HOUR, args=["you"]))
        await look_at_once([each], NOON)
    await each.source.add_schedule(schedule(interval=HOUR, args=["me"]))
    assert len(await schedulers.sent()) == 1
    assert [one.args for one in await each.source.get_schedules()] == [["me"]]


async def test_the_priority_and_the_delay_of_a_schedule_are_the_task_s(
    schedulers: Schedulers,
) -> None:
    each = await schedulers.start()
    labels = {"priority": "7", "queue_name": "mail", "delay": 60}
    await each.source.add_schedule(schedule(time=NOON, labels=labels))
    await look_at_once([each], NOON)
    [row] = await schedulers.database.fetch(
        "SELECT *, available_at - queued_at AS delay FROM taskiq_results_queue"
    )
    assert (row["queue_name"], row["priority"], row["delay"]) == ("mail", 7, timedelta(minutes=1))


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_what_cannot_work_is_refused_as_it_is_added(schedulers: Schedulers) -> None:
    source = (await schedulers.start(field_for_task_id="VarChar")).source
    refused = {
        "NUL": schedule("a\0", interval=1),
        "longer than the 2692 bytes": schedule("a" * 2693, interval=1),
        "must be a non-empty str": schedule("", interval=1),
        "one of cron, interval and time": schedule(interval=1, time=NOON),
        "cron expression '\\* \\*'": schedule(cron="* *"),
        "No time zone found": schedule(cron="* * * * *", cron_offset="Mars/Base"),
        "label priority": schedule(interval=1, labels={"priority": 10}),
        "label queue_name": schedule(interval=1, labels={"queue_name": ""}),
        "cannot be serialized": schedule(interval=1, args=[object()]),
    }
    for text, each in refused.items():
        with pytest.raises(ConfigurationError, match=text):
            await source.add_schedule(each)
    with pytest.raises(InvalidTaskIdError, match="NUL"):
        await source.add_schedule(schedule(interval=1, task_id="a\0"))
    for wrong in ("a\0", "a" * 2693, ""):
        with pytest.raises(ConfigurationError, match="schedule id"):
            await source.delete_schedule(wrong)
    assert await schedulers.stored() == {}


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_an_unknown_schedule_is_deleted_without_an_error(
    schedulers: Schedulers, caplog: pytest.LogCaptureFixture
) -> None:
    source = (await schedulers.start()).source
    with caplog.at_level(logging.INFO, "taskiq_sa_pg"):
        await source.delete_schedule("nobody's")
    assert "schedule nobody's does not exist: it was sent or deleted before" in caplog.messages


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_a_schedule_that_cannot_be_read_is_left_out(
    schedulers: Schedulers, caplog: pytest.LogCaptureFixture
) -> None:
    source = (await schedulers.start()).source
    for name in ("good", "bad"):
        await source.add_schedule(schedule(name, interval=1))
    await schedulers.database.fetch(
        "UPDATE taskiq_results_schedules SET message = 'x' WHERE schedule_id = 'bad'"
    )
    assert [each.schedule_id for each in await source.get_schedules()] == ["good"]
    assert "schedule bad of task greet in table taskiq_results_schedules cannot be read" in (
        caplog.text
    )


def test_a_source_needs_a_broker_with_schedules() -> None:
    with pytest.raises(ConfigurationError, match="takes a SQLAlchemyBroker, not InMemoryBroker"):
        SQLAlchemyScheduleSource(InMemoryBroker())  # type: ignore[arg-type]
    models = build_models(queue=True)
    without = Models(models.Result, models.Progress, Queue=models.Queue)
    with pytest.raises(ConfigurationError, match="subclass of ScheduleMixin"):
        SQLAlchemyScheduleSource(SQLAlchemyBroker("postgresql://host/db", models=without))


@pytest.mark.parametrize("schedulers", ["asyncpg"], indirect=True)
async def test_a_source_works_from_startup_to_shutdown(schedulers: Schedulers) -> None:
    broker = (await schedulers.start()).broker
    await schedulers.stop()
    source = SQLAlchemyScheduleSource(broker)
    with pytest.raises(NotStartedError):
        await source.get_schedules()
    await source.startup()
    await source.add_schedule(schedule(interval=1))
    await source.shutdown()
    with pytest.raises(NotStartedError):
        await source.get_schedules()
    await broker.startup()  # as in a worker, where nobody starts the source
    assert len(await source.get_schedules()) == 1
    await broker.shutdown()
