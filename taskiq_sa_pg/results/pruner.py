"""Deletes expired results and old progress: on demand, and in the background of workers."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from math import inf
from typing import Any, Final, NamedTuple

from sqlalchemy import Column, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg.background import end_task, is_running, start_task
from taskiq_sa_pg.codec import Seconds, check_seconds
from taskiq_sa_pg.database import Database, sqlstate_of
from taskiq_sa_pg.exceptions import TaskiqSaPgError, check_whole
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.statements import (
    LIMIT_WAITING_ON_NODES,
    Slice,
    begin_slice,
    count_expired,
    count_stale,
    prune_results,
    prune_stale,
)
from taskiq_sa_pg.telemetry import Telemetry

logger = logging.getLogger(__name__)

# SQLSTATE.
_LOCK_NOT_AVAILABLE: Final = "55P03"

# PostgreSQL's resolution of timestamps.
_NEXT_MOMENT: Final = timedelta(microseconds=1)


@dataclass(frozen=True)
class Pruned:
    """Numbers of rows that prune() has deleted.

    Attributes:
        results: Expired results; their progress is not counted.
        progress: Progress of tasks that never finished.
        statuses: Statuses of tasks that never finished.
        is_complete: False if limit or time_budget ended the run early.
    """

    results: int
    progress: int
    statuses: int
    is_complete: bool


class Pruner:
    """Prunes one results table and its related tables, on demand and at regular intervals."""

    def __init__(self, settings: Settings, database: Database, telemetry: Telemetry) -> None:
        self._database = database
        self._models = settings.models
        self._telemetry = telemetry
        self._at_once = settings.timings.pruned_at_once
        self._progress_ttl = settings.progress_ttl
        self._interval = settings.prune_interval
        self._purpose = f"prune table {settings.table}"
        self.is_distributed = False  # whether Citus sends rows to other nodes
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        # Where the next regular run continues if the previous one ended early.
        self._resume_at: dict[str, Any] = {}

    @property
    def is_running(self) -> bool:
        """Whether it prunes at regular intervals."""
        return is_running(self._task)

    def start(self) -> None:
        """Begins to prune at regular intervals, if prune_interval is set and it has not begun."""
        if self._interval is not None and not (self._is_closed or self.is_running):
            self._task = start_task(self._run_regularly(self._interval))

    async def close(self) -> None:
        """Ends pruning at regular intervals."""
        self._is_closed = True
        await end_task(self._task)

    async def run(
        self,
        limit: int | None = None,
        time_budget: float | None = None,
        *,
        is_exclusive: bool = False,
    ) -> Pruned:
        """Deletes expired rows, one slice after the other.

        Args:
            limit: Maximum number of rows, not counting progress and status of deleted results.
            time_budget: Seconds after which no further slice begins.
            is_exclusive: Whether to do nothing if another process prunes exclusively.

        Raises:
            StorageError: PostgreSQL rejected a statement or is unreachable.
        """
        rest = _Rest(limit, time_budget)
        lock = f"prune {self._models.config.table_name}" if is_exclusive else None
        deleted = {}
        with self._telemetry.pruning():
            for name, source in self._sources.items():
                deleted[name] = await self._prune(name, source, lock, rest)
        return _pruned(deleted, is_complete=not rest.was_too_little)

    async def _prune(self, name: str, source: "_Source", lock: str | None, rest: "_Rest") -> int:
        deleted, start = 0, None
        if lock is not None and source.is_stale:
            start = self._resume_at.pop(name, None)
        while rest.has_more():
            done = await self._delete_slice(source, start, rest.rows, lock)
            if done is None:
                break  # another process prunes
            part, gone = done
            self._telemetry.note_pruned(name, gone)
            deleted += gone
            rest.note(gone)
            if part.end is None and not (source.is_stale and rest.rows == 0):
                return deleted
            start = part.end
            if part.is_one_moment and not gone:
                start += _NEXT_MOMENT  # locked rows are left for the next run
        if lock is not None and source.is_stale:
            self._resume_at[name] = start
        return deleted

    async def _delete_slice(
        self, source: "_Source", start: Any, most: int | None, lock: str | None
    ) -> tuple[Slice, int] | None:
        """Deletes a slice; returns it with the number of rows, None if another process prunes."""
        size = self._at_once
        if most is not None and most < size and not source.is_stale:
            size = most  # all of its rows have expired

        async def work(connection: AsyncConnection) -> tuple[Slice, int] | None:
            begin = begin_slice(source.column, start, size, lock=lock)
            _, may_run, end = (await connection.execute(begin)).one()
            if not may_run:
                return None
            if self.is_distributed:
                for setting in LIMIT_WAITING_ON_NODES:
                    await connection.execute(setting)
            part = Slice(start, end, size, most)
            parameters = {"seconds": self._progress_ttl} if source.is_stale else {}
            try:
                deleted = await connection.scalar(source.delete(part), parameters)
            except DBAPIError as exc:
                if sqlstate_of(exc) == _LOCK_NOT_AVAILABLE:
                    raise _LockedError(part) from exc
                raise
            return part, deleted

        try:
            return await self._database.transact(work, self._purpose)
        except _LockedError as exc:
            return exc.part, 0  # left for the next run

    async def count(self) -> Pruned:
        """Counts the rows that run() would delete.

        Raises:
            StorageError: PostgreSQL rejected a statement or is unreachable.
        """
        deleted = {}
        for name, source in self._sources.items():
            parameters = {"seconds": self._progress_ttl} if source.is_stale else {}
            rows = await self._database.fetch(source.counting, parameters, self._purpose)
            [[deleted[name]]] = rows
        return _pruned(deleted, is_complete=True)

    async def _run_regularly(self, interval: float) -> None:
        # At random times, because processes may have started together.
        await asyncio.sleep(interval * random.random())  # noqa: S311 - not a secret
        while True:
            try:
                pruned = await self.run(time_budget=interval, is_exclusive=True)
            except TaskiqSaPgError as exc:
                logger.warning("%s; trying again in %g s", exc, interval)
            else:
                if pruned.results or pruned.progress or pruned.statuses:
                    logger.info("pruned: %s", pruned)
            await asyncio.sleep(interval * random.uniform(0.9, 1.1))  # noqa: S311 - as above

    @cached_property
    def _sources(self) -> dict[str, "_Source"]:
        models = self._models
        results = models.results_table
        sources = {
            "results": _Source(
                results.c.expires_at, partial(prune_results, models), count_expired(models)
            )
        }
        if self._progress_ttl is not None:
            for name, table in zip(("progress", "status"), models.other_tables, strict=False):
                delete, count = partial(prune_stale, models, table), count_stale(models, table)
                sources[name] = _Source(table.c.task_id, delete, count, is_stale=True)
        return sources


class _Source(NamedTuple):
    """A table to prune."""

    column: Column[Any]  # orders the slices
    delete: Callable[[Slice], Select[Any]]
    counting: Select[Any]
    is_stale: bool = False  # whether its rows are deleted by their age


class _LockedError(Exception):
    """A row of a slice is locked by another transaction."""

    def __init__(self, part: Slice) -> None:
        self.part = part


def _pruned(deleted: Mapping[str, int], *, is_complete: bool) -> Pruned:
    return Pruned(
        deleted["results"], deleted.get("progress", 0), deleted.get("status", 0), is_complete
    )


class _Rest:
    """What is left of the limits: a number of `rows`, None for any number, and a deadline."""

    def __init__(self, rows: int | None, time_budget: float | None) -> None:
        self.rows = rows
        self._deadline = inf if time_budget is None else time.monotonic() + time_budget
        self.was_too_little = False

    def has_more(self) -> bool:
        """Whether another slice may begin."""
        self.was_too_little = self.rows == 0 or time.monotonic() >= self._deadline
        return not self.was_too_little

    def note(self, deleted: int) -> None:
        """Subtracts deleted rows."""
        if self.rows is not None:
            # A slice may delete more, if rows were stored since it began.
            self.rows = max(0, self.rows - deleted)


def check_limits(limit: int | None, time_budget: Seconds | None) -> float | None:
    """Checks the limits and returns the time budget in seconds.

    Raises:
        ConfigurationError: One of them is invalid.
    """
    check_whole("limit", limit, or_none=True)
    return check_seconds("time_budget", time_budget)
