"""Deleting what has expired: on demand, and in the background of workers."""

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import Select, Table

from taskiq_sa_pg.codec import Seconds, check_seconds
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError, StorageError
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements import (
    ResultsSlice,
    StaleSlice,
    count_expired,
    count_stale,
    prune_results,
    prune_stale,
)
from taskiq_sa_pg.telemetry import Telemetry
from taskiq_sa_pg.timings import Timings
from taskiq_sa_pg.waiting import end

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What prune() has deleted.

    Attributes:
        results: Rows of expired results; their progress is not counted.
        progress: Rows of progress whose task never finished.
        statuses: Rows of the status table whose task never finished.
        is_complete: Whether nothing was left because of limit or time_budget.
    """

    results: int
    progress: int
    statuses: int
    is_complete: bool


class Pruner:
    """Prunes one results table and those that go with it, on demand and at regular times.

    Args:
        database: Where the statements run.
        models: The tables.
        telemetry: Counts what is deleted.
        timings: How many rows a statement deletes.
        progress_ttl: After how many seconds progress and status are deleted of a task that has no
            result; None keeps them.
        interval: Seconds between two runs in the background, give or take a tenth; None runs none.
    """

    def __init__(
        self,
        database: Database,
        models: Models,
        telemetry: Telemetry,
        timings: Timings,
        *,
        progress_ttl: float | None,
        interval: float | None,
    ) -> None:
        self._database = database
        self._models = models
        self._telemetry = telemetry
        self._at_once = timings.pruned_at_once
        self._progress_ttl = progress_ttl
        self._interval = interval
        self._purpose = f"prune table {models.config.qualified_name}"
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        """Whether it prunes at regular times."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begins to prune at regular times, if there are any and it has not."""
        if self._interval is not None and self._task is None and not self._is_closed:
            self._task = asyncio.create_task(self._run_regularly(self._interval))

    async def close(self) -> None:
        """Ends that."""
        self._is_closed = True
        if self._task is not None:
            await end(self._task)

    async def run(
        self,
        limit: int | None = None,
        time_budget: float | None = None,
        *,
        is_exclusive: bool = False,
    ) -> Pruned:
        """Deletes what has expired, a slice after the other.

        Args:
            limit: How many rows at most, progress and status of deleted results aside.
            time_budget: After how many seconds no further slice is begun.
            is_exclusive: Whether to leave everything to another process that does it exclusively.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        rest = _Rest(limit, time_budget, self._at_once)
        stale = dict.fromkeys(("progress", "status"), 0)
        with self._telemetry.pruning():
            results = await self._prune_results(rest, is_exclusive)
            if self._progress_ttl is not None:
                for name, statement in self._prune_stale.items():
                    stale[name] = await self._prune_table(rest, name, statement, is_exclusive)
        return Pruned(results, stale["progress"], stale["status"], not rest.was_too_little)

    async def count(self) -> Pruned:
        """What run() would delete.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        [[results]] = await self._database.fetch(count_expired(self._models), {}, self._purpose)
        stale = dict.fromkeys(("progress", "status"), 0)
        if self._progress_ttl is not None:
            for name, table in self._stale_tables.items():
                statement, parameters = (
                    count_stale(self._models, table),
                    {"seconds": self._progress_ttl},
                )
                [[stale[name]]] = await self._database.fetch(statement, parameters, self._purpose)
        return Pruned(results, stale["progress"], stale["status"], is_complete=True)

    async def _prune_results(self, rest: "_Rest", is_exclusive: bool) -> int:
        deleted, start = 0, None
        while size := rest.next_slice():
            parameters = {"size": size, "start": start, "is_exclusive": is_exclusive}
            done = ResultsSlice._make(await self._one(self._prune_expired, parameters))
            self._note("results", done.deleted, rest)
            deleted += done.deleted
            start = done.last
            if done.deleted < size:
                break
        return deleted

    async def _prune_table(
        self, rest: "_Rest", name: str, statement: Select[Any], is_exclusive: bool
    ) -> int:
        deleted, start = 0, None
        while most := rest.next_slice():
            parameters = {
                "size": self._at_once,
                "most": most,
                "seconds": self._progress_ttl,
                "start": start,
                "is_exclusive": is_exclusive,
            }
            done = StaleSlice._make(await self._one(statement, parameters))
            self._note(name, done.deleted, rest)
            deleted += done.deleted
            start = done.last
            if done.looked_at < self._at_once:
                break
        return deleted

    def _note(self, name: str, deleted: int, rest: "_Rest") -> None:
        self._telemetry.note_pruned(name, deleted)
        rest.take(deleted)

    async def _one(self, statement: Select[Any], parameters: Mapping[str, Any]) -> Any:
        [row] = await self._database.fetch(statement, parameters, self._purpose)
        return row

    async def _run_regularly(self, interval: float) -> None:
        # Not all processes at once, which may have started together.
        await asyncio.sleep(interval * random.random())  # noqa: S311 - no secret
        while True:
            try:
                pruned = await self.run(time_budget=interval, is_exclusive=True)
            except StorageError as exc:
                logger.warning("%s; it is tried again in %g s", exc, interval)
            else:
                if pruned.results or pruned.progress or pruned.statuses:
                    logger.info("pruned: %s", pruned)
            await asyncio.sleep(interval * random.uniform(0.9, 1.1))  # noqa: S311 - as above

    @property
    def _stale_tables(self) -> dict[str, Table]:
        return dict(zip(("progress", "status"), self._models.other_tables, strict=False))

    @cached_property
    def _prune_expired(self) -> Select[Any]:
        return prune_results(self._models)

    @cached_property
    def _prune_stale(self) -> dict[str, Select[Any]]:
        tables = self._stale_tables
        return {name: prune_stale(self._models, table) for name, table in tables.items()}


class _Rest:
    """How much may still be done."""

    def __init__(self, limit: int | None, time_budget: float | None, at_once: int) -> None:
        self._rows = limit
        self._deadline = None if time_budget is None else time.monotonic() + time_budget
        self._at_once = at_once
        self.was_too_little = False

    def next_slice(self) -> int:
        """How many rows may be deleted next; 0 if it is enough."""
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        if is_late or self._rows == 0:
            self.was_too_little = True
            return 0
        return self._at_once if self._rows is None else min(self._rows, self._at_once)

    def take(self, rows: int) -> None:
        """Notes what was deleted."""
        if self._rows is not None:
            self._rows -= rows


def check_limits(limit: int | None, time_budget: Seconds | None) -> float | None:
    """The time budget in seconds.

    Raises:
        ConfigurationError: One of them cannot be.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ConfigurationError(f"limit must be 1 or more, or None, not {limit!r}")
    return check_seconds("time_budget", time_budget)
