"""Drills with worker processes: no task is lost, and none runs twice without need."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from demo import workers
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import AsyncTaskiqTask

from taskiq_sa_pg import TaskAbandonedError
from tests.faults.conftest import DRIVERS, make_tables
from tests.faults.drills import (
    DELAY,
    HERE,
    IN_HAND,
    Ledger,
    environment,
    imported,
    make_queue,
    once,
    target,
)
from tests.faults.outages import restart, terminate_often
from tests.faults.servers import Server, ask

WORKERS = 3
LEASE = 1.5


@dataclass(frozen=True)
class Drill:
    """Three worker processes, and what a process that had ended sent before they began."""

    driver: str
    server: Server
    tasks: ModuleType
    ledger: Ledger
    early: str
    delayed: str
    due: Any  # of the delayed one: its `delay`, and when that is over


@pytest.fixture(scope="module", params=DRIVERS)
def drill(request: pytest.FixtureRequest, shared_server: Server) -> Iterator[Drill]:
    server, driver = shared_server, request.param
    server.start()
    asyncio.run(prepare(server))
    sender = "import asyncio, drill_tasks; asyncio.run(drill_tasks.send_and_exit())"
    with environment(server.dsn, driver, lease=LEASE):
        command = [sys.executable, "-c", sender]
        sent = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True)
        early, delayed = sent.stdout.split()
        due = asyncio.run(due_of(server, delayed))
        with imported() as module, workers(*target(), cwd=HERE, count=WORKERS, stop_timeout=0):
            yield Drill(driver, server, module, Ledger(server.dsn), early, delayed, due)


async def prepare(server: Server) -> None:
    await make_tables(server)
    await make_queue(server.dsn)


async def due_of(server: Server, task_id: str) -> Any:
    query = """
        SELECT available_at, extract(epoch FROM available_at - queued_at)::float AS delay
        FROM taskiq_results_queue WHERE task_id = $1
    """
    [row] = await ask(server.dsn, query, task_id)
    return row


@pytest.fixture
def ledger(drill: Drill) -> Ledger:
    return drill.ledger


@pytest.fixture
async def tasks(drill: Drill) -> AsyncIterator[ModuleType]:
    """The module of the tasks, whose broker is started here, too."""
    await drill.tasks.broker.startup()
    yield drill.tasks
    await drill.tasks.broker.shutdown()


async def test_what_was_sent_before_a_worker_began_is_run_once(
    drill: Drill, ledger: Ledger
) -> None:
    assert await ledger.count_when_done([drill.early]) == once([drill.early])


async def test_each_of_20_tasks_runs_once_over_3_processes(
    tasks: ModuleType, ledger: Ledger
) -> None:
    sent = await asyncio.gather(*[tasks.work.kiq(0.2) for _ in range(20)])
    assert await ledger.count_when_done(sent) == once(sent)
    assert len({run["pid"] for run in await ledger.runs(sent)}) > 1


async def test_a_retry_middleware_has_all_its_attempts(tasks: ModuleType, ledger: Ledger) -> None:
    task = await tasks.succeed_at_last.kiq()
    result = await task.wait_result(timeout=30)
    assert (result.is_err, result.return_value) == (False, 2)
    assert await ledger.count_when_done([task]) == {task.task_id: 3}


async def test_what_was_rolled_back_never_runs(tasks: ModuleType, ledger: Ledger) -> None:
    engine = tasks.broker.runtime.database.engine
    async with AsyncSession(engine) as session:
        rolled_back = await tasks.broker.in_session(session).kiq(tasks.work)
        await session.rollback()
        committed = await tasks.broker.in_session(session).kiq(tasks.work)
        await session.commit()
    counts = await ledger.count_when_done([rolled_back, committed])
    assert counts == {rolled_back.task_id: 0, committed.task_id: 1}


@pytest.mark.parametrize("drill", ["psycopg"], indirect=True)
async def test_a_task_that_is_longer_than_its_lease_runs_once(
    tasks: ModuleType, ledger: Ledger
) -> None:
    """With one driver: the drills that end with a worker renew with the other, too."""
    task = await tasks.work.kiq(2.5 * LEASE)
    assert await ledger.count_when_done([task]) == once([task])


async def test_a_delay_outlives_its_sender(drill: Drill, ledger: Ledger) -> None:
    assert await ledger.count_when_done([drill.delayed]) == once([drill.delayed])
    [run] = await ledger.runs([drill.delayed])
    assert drill.due["delay"] == DELAY
    assert run["at"] >= drill.due["available_at"]


async def test_the_task_of_a_worker_that_is_killed_is_run_by_another(
    tasks: ModuleType, ledger: Ledger
) -> None:
    task = await tasks.hold.kiq()
    [first] = await ledger.wait_for_runs([task])
    os.kill(first["pid"], signal.SIGKILL)
    result = await task.wait_result(timeout=30)
    assert result.return_value == 2
    assert await ledger.count_when_done([task]) == {task.task_id: 2}
    assert len({run["pid"] for run in await ledger.runs([task])}) == 2


@pytest.mark.parametrize("drill", ["asyncpg"], indirect=True)
async def test_a_task_that_kills_its_workers_is_given_up_and_the_others_are_run(
    tasks: ModuleType, ledger: Ledger
) -> None:
    """With one driver: nothing of it is the driver's."""
    before = [await tasks.work.kiq() for _ in range(5)]
    poison = await tasks.kill_the_worker.kiq()
    after = [await tasks.work.kiq() for _ in range(5)]
    result = await poison.wait_result(timeout=30)
    assert isinstance(result.error, TaskAbandonedError)
    counts = await ledger.count_when_done(before + after)
    assert set(counts) == set(once(before + after))
    assert min(counts.values()) == 1
    assert await ledger.count([poison]) == {poison.task_id: tasks.MAX_DELIVERIES}
    [row] = await ask(
        ledger.dsn,
        "SELECT available_at = 'infinity' FROM taskiq_results_queue WHERE task_id = $1",
        poison.task_id,
    )
    assert row[0]


async def send_while(
    drill: Drill, fault: asyncio.Task[None], seconds: float = 0.01
) -> list[AsyncTaskiqTask[Any]]:
    """Sends tasks one after the other, from four senders, until the fault is over and beyond."""
    sent: list[AsyncTaskiqTask[Any]] = []

    async def send() -> None:
        after = 10
        while after:
            sent.append(await drill.tasks.work.kiq(seconds))
            after -= fault.done()

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(send())
    await fault
    return sent


async def test_connections_that_are_all_cut_lose_no_task_and_repeat_none(
    drill: Drill, tasks: ModuleType, ledger: Ledger
) -> None:
    before = [await tasks.work.kiq(0.01) for _ in range(50)]
    sent = await send_while(drill, asyncio.create_task(terminate_often(drill.server, times=3)))
    assert await ledger.count_when_done(before + sent) == once(before + sent)


async def test_a_server_that_restarts_and_crashes_loses_no_task(
    drill: Drill, tasks: ModuleType, ledger: Ledger
) -> None:
    """A lease may end while nobody can renew it: only what is in hand may run again."""

    async def restart_twice() -> None:
        await restart(drill.server, signal.SIGINT)
        await ledger.wait_for_runs(before, 20)
        await restart(drill.server, signal.SIGQUIT)

    before = [await tasks.work.kiq(0.01) for _ in range(50)]
    sent = before + await send_while(drill, asyncio.create_task(restart_twice()))
    counts = await ledger.count_when_done(sent)
    assert min(counts.values()) == 1
    assert sum(counts.values()) - len(sent) <= 2 * WORKERS * IN_HAND


@pytest.mark.parametrize("drill", ["psycopg"], indirect=True)
async def test_a_worker_that_is_ended_gives_back_what_it_has_not_begun(
    drill: Drill, tasks: ModuleType, ledger: Ledger
) -> None:
    """At once; and what it does not know it leaves to the next, as in a deployment.

    With one driver, because it starts two workers.
    """
    new = await tasks.newcomer.kicker().with_labels(queue_name="aside").kiq()
    known = tasks.work.kicker().with_labels(queue_name="aside")
    sent = await asyncio.gather(*[known.kiq(0.05) for _ in range(100)])
    with (
        environment(drill.server.dsn, drill.driver, lease=60, DRILL_IS_OLD="yes"),
        workers(*target("aside"), cwd=HERE, count=1, stop_timeout=0) as process,
    ):
        await ledger.wait_for_runs(sent, 20)
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
        left = await ledger.waiting(sent)
        assert {tuple(row) for row in left} == {(None, 0, True)}
        assert await ledger.count([new]) == {new.task_id: 0}
    with (
        environment(drill.server.dsn, drill.driver, lease=60),
        workers(*target("aside"), cwd=HERE, count=1, stop_timeout=0),
    ):
        assert await ledger.count_when_done([*sent, new]) == once([*sent, new])
