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
from demo import workers
from taskiq import AsyncTaskiqTask

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.conftest import Database, eventually
from tests.faults.outages import restart
from tests.faults.servers import Server, ask

HERE = Path(__file__).parent
TASKS = 500


async def stored_in(server: Server) -> set[str]:
    return {row["task_id"] for row in await ask(server.dsn, "SELECT task_id FROM taskiq_results")}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_process_that_ends_in_mid_batch_loses_nothing_it_acknowledged(
    how: signal.Signals, server: Server
) -> None:
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
    server: Server, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ModuleType]:
    """The module `tasks`, served by a worker process; only the results' server is `server`."""
    monkeypatch.setenv("FAULTS_SAVED", str(tmp_path / "saved"))
    monkeypatch.setenv("FAULTS_BROKER_DSN", database.dsn)
    monkeypatch.setenv("FAULTS_RESULTS_DSN", server.dsn)
    monkeypatch.syspath_prepend(HERE)
    module = importlib.import_module("tasks")
    with workers("tasks:broker", cwd=HERE, count=1) as module.process:
        await module.broker.startup()
        yield module
        await module.broker.shutdown()
    del sys.modules["tasks"]


@pytest.mark.parametrize(
    ("restarting", "ending"), [(signal.SIGINT, signal.SIGTERM), (signal.SIGQUIT, signal.SIGKILL)]
)
async def test_no_task_is_lost_where_the_results_server_restarts_and_then_the_workers_end(
    restarting: signal.Signals,
    ending: signal.Signals,
    server: Server,
    tasks: ModuleType,
    tmp_path: Path,
) -> None:
    """Half of the waiters are taskiq's own, which poll, and half are the backend's."""
    sent = [await tasks.double.kiq(number) for number in range(TASKS // 4)]
    waiters = [asyncio.ensure_future(wait(tasks, task, i)) for i, task in enumerate(sent)]
    restarted = asyncio.create_task(restart(server, restarting))
    for number in range(TASKS // 4, TASKS):
        task = await tasks.double.kiq(number)
        waiters.append(asyncio.ensure_future(wait(tasks, task, number)))
    await restarted
    assert await asyncio.gather(*waiters) == [2 * number for number in range(TASKS)]

    before = len(saved_in(tmp_path))
    await asyncio.gather(*[tasks.double.kiq(number) for number in range(TASKS)])

    async def are_some_saved() -> bool:
        return len(saved_in(tmp_path)) >= before + TASKS // 4

    await eventually(are_some_saved)
    os.killpg(tasks.process.pid, ending)
    await asyncio.to_thread(tasks.process.wait)
    assert saved_in(tmp_path) <= await stored_in(server)


def saved_in(folder: Path) -> set[str]:
    """The tasks that the workers have acknowledged."""
    path = folder / "saved"
    return set(path.read_text().split()) if path.exists() else set()


async def wait(tasks: ModuleType, task: AsyncTaskiqTask[int], number: int) -> int:
    backend: SQLAlchemyResultBackend[int] = tasks.backend
    waiting = backend.wait_result(task, 60) if number % 2 else task.wait_result(timeout=60)
    return (await waiting).return_value
