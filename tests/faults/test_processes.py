"""Processes that end in the middle, and tasks whose results' server restarts in the middle."""

import asyncio
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest
from demo import make_broker_table, workers
from taskiq import AsyncTaskiqTask

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.conftest import Database, eventually
from tests.faults.conftest import Start
from tests.faults.servers import Server, ask

HERE = Path(__file__).parent
TASKS = 500


async def stored_in(server: Server) -> set[str]:
    return {row["task_id"] for row in await ask(server.dsn, "SELECT task_id FROM taskiq_results")}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_process_that_ends_in_mid_batch_loses_nothing_it_acknowledged(
    how: signal.Signals, server: Server, start: Start
) -> None:
    await start(server.dsn)
    for _ in range(3):
        await ask(server.dsn, "TRUNCATE taskiq_results")
        process = await asyncio.create_subprocess_exec(
            sys.executable, HERE / "writer.py", server.dsn, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        printed = [await process.stdout.readline() for _ in range(500)]
        process.send_signal(how)
        rest, _ = await process.communicate()
        lines = [line.decode().strip() for line in [*printed, *rest.splitlines()]]
        acknowledged = set(lines) - {""}
        assert len(acknowledged) >= 500
        stored = await stored_in(server)
        if how == signal.SIGTERM:
            # All that was accepted is there, and all of it was acknowledged.
            assert process.returncode == 0
            assert stored == acknowledged
        else:
            # The end of the last line may have been cut off.
            acknowledged.discard(lines[-1])
            assert acknowledged <= stored


@pytest.fixture
async def tasks(
    server: Server,
    database: Database,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[ModuleType]:
    """The module `tasks`, served by two worker processes; only the results' server is `server`."""
    await make_broker_table(database.dsn)
    await start(server.dsn)
    monkeypatch.setenv("FAULTS_SAVED", str(tmp_path / "saved"))
    monkeypatch.setenv("FAULTS_BROKER_DSN", database.dsn)
    monkeypatch.setenv("FAULTS_RESULTS_DSN", server.dsn)
    monkeypatch.syspath_prepend(HERE)
    module = importlib.import_module("tasks")
    with workers("tasks:broker", cwd=HERE) as module.process:
        await module.broker.startup()
        yield module
        await module.broker.shutdown()
    del sys.modules["tasks"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_workers_that_end_in_the_middle_lose_no_task_they_acknowledged(
    how: signal.Signals, server: Server, tasks: ModuleType, tmp_path: Path
) -> None:
    await asyncio.gather(*[tasks.double.kiq(number) for number in range(TASKS)])

    async def are_some_saved() -> bool:
        return len(saved_in(tmp_path)) >= TASKS // 4

    await eventually(are_some_saved)
    os.killpg(tasks.process.pid, how)
    await asyncio.to_thread(tasks.process.wait)
    assert saved_in(tmp_path) <= await stored_in(server)


def saved_in(folder: Path) -> set[str]:
    path = folder / "saved"
    return set(path.read_text().split()) if path.exists() else set()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_tasks_over_a_restart_of_the_results_server(
    how: signal.Signals, server: Server, tasks: ModuleType
) -> None:
    """Half of the waiters are taskiq's own, which poll, and half are the backend's."""
    sent = [await tasks.double.kiq(number) for number in range(TASKS // 4)]
    waiters = [asyncio.ensure_future(wait(tasks, task, i)) for i, task in enumerate(sent)]
    restart = asyncio.create_task(asyncio.to_thread(_restart, server, how))
    for number in range(TASKS // 4, TASKS):
        task = await tasks.double.kiq(number)
        waiters.append(asyncio.ensure_future(wait(tasks, task, number)))
    await restart
    assert await asyncio.gather(*waiters) == [2 * number for number in range(TASKS)]


async def wait(tasks: ModuleType, task: AsyncTaskiqTask[int], number: int) -> int:
    backend: SQLAlchemyResultBackend[int] = tasks.backend
    waiting = backend.wait_result(task, 60) if number % 2 else task.wait_result(timeout=60)
    return (await waiting).return_value


def _restart(server: Server, how: signal.Signals) -> None:
    server.stop(how)
    server.start()
