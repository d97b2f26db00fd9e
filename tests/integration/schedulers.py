"""Schedulers in one process: each with a broker, a source and a loop of its own, on one table."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from taskiq import ScheduledTask, TaskiqScheduler
from taskiq.cli.scheduler.run import SchedulerLoop, get_all_schedules, send

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyScheduleSource, build_models
from taskiq_sa_pg.database import make_engine
from tests.conftest import Database

NOON = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)


def schedule(schedule_id: str = "a", **kwargs: object) -> ScheduledTask:
    """A schedule of the task that all brokers have."""
    values = {"task_name": "greet", "labels": {}, "args": ["you"], "kwargs": {}, **kwargs}
    return ScheduledTask(schedule_id=schedule_id, **values)  # type: ignore[arg-type]


async def greet(name: str) -> str:
    return f"hello {name}"


def broker_of(dsn: str, **kwargs: Any) -> SQLAlchemyBroker:
    """A broker as it is in a scheduler's process, with one task."""
    broker = SQLAlchemyBroker(dsn, check_schema="off", **kwargs)
    broker.is_scheduler_process = True
    broker.register_task(greet, task_name="greet")
    return broker


class Scheduler:
    """What `taskiq scheduler` runs, one look at a time, at a time that tests choose."""

    def __init__(self, broker: SQLAlchemyBroker) -> None:
        self.broker = broker
        self.source = SQLAlchemyScheduleSource(broker)
        self.scheduler = TaskiqScheduler(broker, [self.source])
        self.loop = SchedulerLoop(self.scheduler)

    async def start(self) -> None:
        await self.source.startup()
        await self.scheduler.startup()

    async def stop(self) -> None:
        await self.scheduler.shutdown()
        await self.source.shutdown()

    async def update(self) -> None:
        """Reads the schedules, as the loop does now and then."""
        found = await get_all_schedules(self.scheduler)
        self.loop.scheduled_tasks = found
        ids = {task.schedule_id for _, tasks in found for task in tasks}
        for last_run in (self.loop.cron_tasks_last_run, self.loop.time_tasks_last_run):
            for gone in last_run.keys() - ids:
                del last_run[gone]

    def due(self, now: datetime) -> list[ScheduledTask]:
        """What the loop finds to be due as it wakes."""
        [(_, tasks)] = self.loop.scheduled_tasks
        is_ready = self.loop._is_schedule_ready_to_send
        return [task for task in tasks if is_ready(task, now)]

    async def look(self, now: datetime) -> None:
        """The loop wakes and sends what is due."""
        for task in self.due(now):
            await send(self.scheduler, self.source, task)


class Schedulers:
    """Starts schedulers on one schema, and reads what they have left there.

    Attributes:
        driver: That of the schedulers.
        set_now: Sets the clock by which the minute of a cron expression is found.
    """

    def __init__(self, database: Database, driver: str, patch: pytest.MonkeyPatch) -> None:
        self.database = database
        self.driver = driver
        self.models = build_models(queue=True)
        self._patch = patch
        self._started: list[Scheduler] = []

    async def make_tables(self) -> None:
        engine = make_engine(self.database.dsn)
        async with engine.begin() as connection:
            await connection.run_sync(self.models.metadata.create_all)
        await engine.dispose()

    async def start(
        self,
        prepare: Callable[[SQLAlchemyBroker], object] = lambda _: None,
        dsn: str = "",
        **kwargs: Any,
    ) -> Scheduler:
        """One more scheduler; `prepare` gives its broker tasks and more."""
        broker = broker_of(dsn or self.database.dsn_of(self.driver), **kwargs)
        prepare(broker)
        scheduler = Scheduler(broker)
        await scheduler.start()
        self._started.append(scheduler)
        return scheduler

    async def stop(self) -> None:
        """Ends them all; none may be left open."""
        for scheduler in self._started:
            await scheduler.stop()
        self._started.clear()

    def set_now(self, now: datetime) -> None:
        self._patch.setattr("taskiq_sa_pg.broker.schedules.utc_now", lambda: now)

    async def sent(self) -> list[str]:
        """The task ids in the queue, the first first."""
        query = "SELECT task_id FROM taskiq_results_queue ORDER BY queued_at, task_id"
        return [row["task_id"] for row in await self.database.fetch(query)]

    async def stored(self) -> dict[str, Any]:
        """The rows of schedules by id."""
        rows = await self.database.fetch("SELECT * FROM taskiq_results_schedules")
        return {row["schedule_id"]: row for row in rows}

    async def let_pass(self, interval: str) -> None:
        """As if so much time had passed since the last ticks."""
        await self.database.fetch(
            f"UPDATE taskiq_results_schedules SET last_tick = last_tick - interval '{interval}'"
        )


async def look_at_once(schedulers: list[Scheduler], now: datetime) -> None:
    """All read the schedules, and then wake in the same moment."""
    await asyncio.gather(*(each.update() for each in schedulers))
    await asyncio.gather(*(each.look(now) for each in schedulers))
