"""Worker processes, what they are told by their environment, and what became of their tasks."""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from unittest.mock import patch

from sqlalchemy.ext.asyncio import create_async_engine
from taskiq import AsyncTaskiqTask

from taskiq_sa_pg import build_models
from tests.conftest import eventually
from tests.faults.servers import ask

HERE: Final = Path(__file__).parent

# So many tasks a worker process executes at once; it may have one more in hand.
AT_ONCE: Final = 4
IN_HAND: Final = AT_ONCE + 1

# Seconds for which a task is sent ahead. On a quiet machine the workers have begun by then.
DELAY: Final = 4.0

_RUNS: Final = """
    CREATE TABLE IF NOT EXISTS runs (
        run uuid PRIMARY KEY, task_id text, pid integer, at timestamptz DEFAULT clock_timestamp()
    )
"""

Sent = Iterable[AsyncTaskiqTask[Any] | str]


def target(broker: str = "broker", at_once: int = AT_ONCE) -> tuple[str, ...]:
    """Arguments of workers()."""
    return "--max-async-tasks", str(at_once), f"drill_tasks:{broker}"


@contextmanager
def environment(
    dsn: str, driver: str, *, lease: float, runs_dsn: str | None = None, **others: str
) -> Iterator[None]:
    """That of the module `drill_tasks`, in this process and in those that it starts."""
    variables = {
        "DRILL_DSN": dsn.replace("postgresql://", f"postgresql+{driver}://", 1),
        "DRILL_RUNS_DSN": runs_dsn or dsn,
        "DRILL_LEASE": str(lease),
        "DRILL_DELAY": str(DELAY),
    }
    with patch.dict(os.environ, variables | others):
        yield


@contextmanager
def imported() -> Iterator[ModuleType]:
    """The module `drill_tasks`, made anew for the environment."""
    with patch.object(sys, "path", [str(HERE), *sys.path]):
        module = importlib.import_module("drill_tasks")
    try:
        yield module
    finally:
        del sys.modules["drill_tasks"]


async def make_queue(dsn: str) -> None:
    """An empty queue, and the empty table of runs; the results' tables are there."""
    models = build_models(queue=True)
    assert models.queue_table is not None
    engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://", 1))
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all, [models.queue_table])
    await engine.dispose()
    await ask(dsn, _RUNS)
    await ask(dsn, "TRUNCATE runs, taskiq_results_queue")


@dataclass(frozen=True)
class Ledger:
    """What is known of the tasks of a database, past the library."""

    dsn: str

    async def runs(self, sent: Sent) -> list[Any]:
        """The runs of these tasks, in their order: task_id, pid, at."""
        query = "SELECT task_id, pid, at FROM runs WHERE task_id = ANY ($1) ORDER BY at"
        return list(await ask(self.dsn, query, _ids(sent)))

    async def count(self, sent: Sent) -> Mapping[str, int]:
        """How often each of these tasks was run."""
        ids = _ids(sent)
        runs = Counter(row["task_id"] for row in await self.runs(ids))
        return {task_id: runs[task_id] for task_id in ids}

    async def waiting(self, sent: Sent) -> list[Any]:
        """What the queue has of these tasks, as a worker may not have acknowledged them."""
        query = """
            SELECT worker, deliveries, available_at - now() < '1 second' AS is_due_soon
            FROM taskiq_results_queue WHERE task_id = ANY ($1)
        """
        return list(await ask(self.dsn, query, _ids(sent)))

    async def count_when_done(self, sent: Sent, seconds: float = 30) -> Mapping[str, int]:
        """How often each of these tasks was run, once none can be run any more."""

        async def are_done() -> bool:
            return not await self.waiting(sent)

        await eventually(are_done, seconds, pause=0.05)
        # A run that could not be stored would be taken for none.
        query = "SELECT error_type FROM taskiq_results WHERE is_err AND task_id = ANY ($1)"
        assert await ask(self.dsn, query, _ids(sent)) == []
        return await self.count(sent)

    async def wait_for_runs(self, sent: Sent, count: int = 1) -> list[Any]:
        """Returns when these tasks were run so often, together."""

        async def are_there() -> bool:
            return len(await self.runs(sent)) >= count

        await eventually(are_there, seconds=30, pause=0.02)
        return await self.runs(sent)


def _ids(sent: Sent) -> list[str]:
    return [each if isinstance(each, str) else each.task_id for each in sent]


def once(sent: Sent) -> Mapping[str, int]:
    """What Ledger.count() should be."""
    return dict.fromkeys(_ids(sent), 1)
