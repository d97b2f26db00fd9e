"""Ticks of schedules while PostgreSQL cannot be reached, and of scheduler processes that die."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from taskiq.exceptions import SendTaskError

from taskiq_sa_pg import StorageError
from tests.conftest import Database, eventually
from tests.faults.proxy import Proxy, proxied
from tests.faults.servers import Server, dsn_of
from tests.integration.schedulers import NOON, Schedulers, look_at_once, schedule

MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)

KINDS = {"cron": "0 12 * * *", "interval": 3600, "time": NOON}


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with proxied(server.port) as proxy:
        yield proxy


@pytest.fixture
async def schedulers(
    server: Server, driver: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Schedulers]:
    """Schedulers on a server that a proxy leads to."""
    database = Database(dsn_of(server.port), f"test_{uuid.uuid4().hex}")
    await database.create()
    schedulers = Schedulers(database, driver, monkeypatch)
    await schedulers.make_tables()
    yield schedulers
    await schedulers.stop()
    await database.drop()


def through(proxy: Proxy, schedulers: Schedulers) -> str:
    database = replace(schedulers.database, server_dsn=dsn_of(proxy.port))
    return database.dsn_of(schedulers.driver)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_tick_that_could_not_be_sent_is_sent_by_a_later_look(
    kind: str, schedulers: Schedulers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    each = await schedulers.start(dsn=through(proxy, schedulers), retry_timeout=0)
    await each.source.add_schedule(schedule(**{kind: KINDS[kind]}))
    schedulers.set_now(NOON)
    await each.update()
    await proxy.refuse()
    with pytest.raises(SendTaskError) as caught:
        await each.look(NOON)
    assert isinstance(caught.value.__cause__, StorageError)
    await each.update()  # of which nothing comes
    assert "the schedules that were read before stay in use" in caplog.text
    later = NOON + 7 * SECOND
    schedulers.set_now(NOON + 2 * MINUTE)  # when the cron expression is long over
    with pytest.raises(SendTaskError):
        await each.look(later)
    assert each.due(later + SECOND) == []  # not at once
    await proxy.open(proxy.port)
    await each.update()
    await each.look(later + 6 * SECOND)
    assert len(await schedulers.sent()) == 1
    await each.update()
    assert each.due(later + MINUTE) == []
    if kind == "cron":
        [row] = (await schedulers.stored()).values()
        assert row["last_tick"] == NOON
    other = await schedulers.start()
    schedulers.set_now(NOON)
    await look_at_once([other], NOON)
    assert len(await schedulers.sent()) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_tick_whose_answer_is_lost_is_not_sent_again(
    kind: str, schedulers: Schedulers, proxy: Proxy
) -> None:
    each = await schedulers.start(dsn=through(proxy, schedulers))
    await each.source.add_schedule(schedule(**{kind: KINDS[kind]}))
    schedulers.set_now(NOON)
    await each.update()
    lost = []

    def lose(data: bytes) -> bool:
        if b"greet" in data and not lost:
            lost.append(data)
            return False
        return True

    proxy.watch = lose
    await each.look(NOON)
    assert lost
    assert len(await schedulers.sent()) == 1


@contextmanager
def scheduler_processes(*dsns: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs `taskiq scheduler` once for each address."""
    command = [sys.executable, "-m", "taskiq", "scheduler", "tests.faults.scheduled:scheduler"]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [*command, "--update-interval", "1"], cwd=root, env={**os.environ, "SCHEDULED_DSN": dsn}
        )
        for dsn in dsns
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def test_three_processes_send_each_tick_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedulers = Schedulers(database, "asyncpg", monkeypatch)
    await schedulers.make_tables()
    each = await schedulers.start()
    for number in range(10):
        time = datetime.now(UTC) + number * SECOND / 4
        one_shot = schedule(f"once {number}", time=time, task_id=f"once {number}")
        await each.source.add_schedule(one_shot)
    await schedulers.stop()
    query = "SELECT queued_at FROM taskiq_results_queue WHERE task_name = 'tick' ORDER BY 1"

    def has_ticked(times: int) -> Awaitable[None]:
        async def has() -> bool:
            return len(await database.fetch(query)) >= times

        return eventually(has, 50, 0.1)

    dsns = [database.dsn, database.psycopg_dsn, database.dsn]
    with scheduler_processes(*dsns) as processes:
        await has_ticked(2)
        processes[0].send_signal(signal.SIGKILL)
        await has_ticked(4)

        async def all_once() -> bool:
            return set(await schedulers.stored()) == {"tick"}

        await eventually(all_once, 40, 0.1)
    sent = [task_id for task_id in await schedulers.sent() if task_id.startswith("once")]
    assert sorted(sent) == [f"once {number}" for number in range(10)]
    ticks = [row["queued_at"] for row in await database.fetch(query)]
    [row] = (await schedulers.stored()).values()
    # At whole distances of the first one, up to those that a busy machine has left out.
    assert len(ticks) - 1 <= (row["last_tick"] - ticks[0]) / SECOND + 0.01
    gaps = [(later - earlier) / SECOND for earlier, later in pairwise(ticks)]
    assert min(gaps) > 0
