"""The processes that execute tasks, and error results for lost tasks."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any, Final

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection
from taskiq import TaskiqResult

from taskiq_sa_pg.codec import TaskMetadata, attach
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import TaskAbandonedError
from taskiq_sa_pg.results.beat import Beat
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.results.writer import Writer
from taskiq_sa_pg.statements import (
    LOST_AFTER,
    StatusRow,
    StoredWorker,
    beat,
    delete_worker,
    select_lost,
    select_workers,
    try_lock,
)

logger = logging.getLogger(__name__)

# Lost tasks that one beat handles; the next beat follows soon.
_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A process that executes tasks, or that ended unexpectedly.

    Attributes:
        worker: Its name, as in TaskStatus.worker.
        started_at: When it started, by the database's clock, in UTC. If processes share a name,
            when the first one started.
        seen_at: Time of its last heartbeat; it sends one every 15 seconds.
        is_alive: Whether it sent a heartbeat in the last 60 seconds.
        running: Number of tasks that it has started and that have no result. They are lost unless
            is_alive.
    """

    worker: str
    started_at: datetime
    seen_at: datetime
    is_alive: bool
    running: int


@dataclass(frozen=True, slots=True, eq=False)
class WorkerProcess:
    """A process that executes tasks, as registered by one middleware.

    Attributes:
        name: Returns its name, which changes after a fork.
        is_own_name: Whether no other process can have this name at the same time.
        abandons_lost: Whether it stores error results for lost tasks.
    """

    name: Callable[[], str]
    is_own_name: bool
    abandons_lost: bool


class Workers:
    """Reads the table of workers, and keeps the row of this process up to date."""

    def __init__(self, settings: Settings, database: Database, writer: Writer) -> None:
        self._settings = settings
        self._database = database
        self._writer = writer
        self._models = settings.models
        config = settings.models.config
        self._table = config.qualified(config.workers_table_name)
        self._beats: dict[str, Beat] = {}
        self._processes: dict[WorkerProcess, str] = {}
        self._is_closed = False

    @property
    def is_seen(self) -> bool:
        """Whether every beat has been stored at least once."""
        return all(beat.is_seen for beat in self._beats.values())

    def begin(self, process: WorkerProcess) -> None:
        """Begins the beat of a process, if tasks are tracked and it has not begun."""
        beat = self._beats.get(self._processes.get(process, ""))
        if beat is not None and beat.is_running:
            return
        has_table = self._models.workers_table is not None
        if self._is_closed or not has_table or not self._settings.is_tracked:
            return
        self._processes[process] = name = process.name()
        if name not in self._beats:
            self._beats[name] = Beat(
                name,
                self._statements,
                self._database,
                self._settings.timings,
                place=self._table,
                is_own_name=process.is_own_name,
                after=partial(self._abandon_lost, name),
            )
        self._beats[name].begin()

    async def end(self, process: WorkerProcess) -> None:
        """Ends the beat of a process and deletes its row, unless another one shares it."""
        name = self._processes.pop(process, None)
        if name is not None and name not in self._processes.values():
            await self._beats.pop(name).end()

    async def close(self) -> None:
        """Ends all beats."""
        self._is_closed = True
        self._processes.clear()
        beats, self._beats = self._beats, {}
        await asyncio.gather(*[beat.end() for beat in beats.values()])

    async def read(self, max_age: float = LOST_AFTER) -> list[WorkerInfo]:
        """Returns all workers by name; a worker seen in the last max_age seconds is alive.

        Raises:
            StorageError: PostgreSQL rejected the query or is unreachable.
        """
        if self._models.workers_table is None:
            return []
        purpose = f"read the workers in table {self._table}"
        rows = await self._database.fetch(self._select, {"max_age": max_age}, purpose)
        return [_info_of(StoredWorker._make(row)) for row in rows]

    async def _abandon_lost(self, name: str) -> None:
        """Stores error results for lost tasks, if a middleware of this worker requests it."""
        owners = [owner for owner, of_name in self._processes.items() if of_name == name]
        if any(owner.abandons_lost for owner in owners):
            purpose = f"store errors of lost tasks in table {self._settings.table}"
            # Limited even if results are locked, because the next beat must not be late.
            seconds = self._settings.timings.beat
            for task_id in await self._writer.store_missing(self.find_lost, purpose, seconds):
                logger.error("task %s was lost with its worker: it has an error result", task_id)

    async def find_lost(self, connection: AsyncConnection) -> Mapping[Any, TaskiqResult[Any]]:
        """Error results of lost tasks; none if another transaction is handling them."""
        lock = try_lock(f"abandon {self._models.config.table_name}")
        if not await connection.scalar(select(lock)):
            return {}
        rows = await connection.execute(self._select_lost, {"limit": _AT_ONCE})
        lost = [StatusRow._make(row) for row in rows]
        return {row.task_id: _result_of_lost(row) for row in lost}

    @cached_property
    def _statements(self) -> tuple[Select[Any], Select[Any]]:
        assert self._models.workers_table is not None
        return beat(self._models.workers_table), delete_worker(self._models.workers_table)

    @cached_property
    def _select(self) -> Select[Any]:
        assert self._models.workers_table is not None
        return select_workers(self._models, self._models.workers_table)

    @cached_property
    def _select_lost(self) -> Select[Any]:
        assert self._models.status_table is not None
        assert self._models.workers_table is not None
        return select_lost(self._models, self._models.status_table, self._models.workers_table)


def _result_of_lost(row: StatusRow) -> TaskiqResult[Any]:
    result: TaskiqResult[Any] = TaskiqResult(
        is_err=True,
        return_value=None,
        execution_time=0,
        error=TaskAbandonedError(str(row.task_id), None, row.worker),
        # So that a later attempt replaces it, and an earlier one does not.
        labels={"_retries": row.attempt} if row.attempt else {},
    )
    metadata = TaskMetadata(
        row.task_name, worker=row.worker, queued_at=row.queued_at, started_at=row.started_at
    )
    attach(result, metadata)
    return result


def _info_of(stored: StoredWorker) -> WorkerInfo:
    # Drivers return times in various zones.
    times = stored.started_at.astimezone(UTC), stored.seen_at.astimezone(UTC)
    return WorkerInfo(stored.worker, *times, stored.is_alive, stored.running)
