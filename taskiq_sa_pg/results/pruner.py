"""Deleting what has expired: on demand, and in the background of workers."""

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

from sqlalchemy import Select, Table

from taskiq_sa_pg.background import end_task, is_running, start_task
from taskiq_sa_pg.codec import Seconds, check_seconds
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import TaskiqSaPgError, check_whole
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.statements import (
    Slice,
    count_expired,
    count_stale,
    prune_results,
    prune_stale,
)
from taskiq_sa_pg.telemetry import Telemetry

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
    """Prunes one results table and those that go with it, on demand and at regular times."""

    def __init__(self, settings: Settings, database: Database, telemetry: Telemetry) -> None:
        self._database = database
        self._models = settings.models
        self._telemetry = telemetry
        self._at_once = settings.timings.pruned_at_once
        self._progress_ttl = settings.progress_ttl
        self._interval = settings.prune_interval
        self._purpose = f"prune table {settings.table}"
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        """Whether it prunes at regular times."""
        return is_running(self._task)

    def start(self) -> None:
        """Begins to prune at regular times, if there are any and it has not."""
        if self._interval is not None and not (self._is_closed or self.is_running):
            self._task = start_task(self._run_regularly(self._interval))

    async def close(self) -> None:
        """Ends that."""
        self._is_closed = True
        await end_task(self._task)

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
        rest = _Rest(limit, time_budget)
        parameters: dict[str, Any] = {"size": self._at_once, "is_exclusive": is_exclusive}
        deleted = {}
        with self._telemetry.pruning():
            for name, statement in self._statements.items():
                if name != "results":
                    parameters["seconds"] = self._progress_ttl
                deleted[name] = await self._prune(name, statement, parameters, rest)
        return _pruned(deleted, is_complete=not rest.was_too_little)

    async def _prune(
        self, name: str, statement: Select[Any], parameters: Mapping[str, Any], rest: "_Rest"
    ) -> int:
        deleted, start, is_last = 0, None, False
        while not is_last and rest.has_more():
            most = self._at_once if rest.rows is None else rest.rows
            given = {**parameters, "start": start, "most": most}
            [row] = await self._database.fetch(statement, given, self._purpose)
            gone, start, is_last = Slice._make(row)
            self._telemetry.note_pruned(name, gone)
            deleted += gone
            if rest.rows is not None:
                rest.rows -= gone
        return deleted

    async def count(self) -> Pruned:
        """What run() would delete.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        deleted = {}
        for name, table in self._tables.items():
            statement = (
                count_stale(self._models, table)
                if name != "results"
                else count_expired(self._models)
            )
            parameters = {"seconds": self._progress_ttl} if name != "results" else {}
            [[deleted[name]]] = await self._database.fetch(statement, parameters, self._purpose)
        return _pruned(deleted, is_complete=True)

    async def _run_regularly(self, interval: float) -> None:
        # Not all processes at once, which may have started together.
        await asyncio.sleep(interval * random.random())  # noqa: S311 - no secret
        while True:
            try:
                pruned = await self.run(time_budget=interval, is_exclusive=True)
            except TaskiqSaPgError as exc:
                logger.warning("%s; it is tried again in %g s", exc, interval)
            else:
                if pruned.results or pruned.progress or pruned.statuses:
                    logger.info("pruned: %s", pruned)
            await asyncio.sleep(interval * random.uniform(0.9, 1.1))  # noqa: S311 - as above

    @property
    def _tables(self) -> dict[str, Table]:
        tables = {"results": self._models.results_table}
        if self._progress_ttl is not None:
            others = zip(("progress", "status"), self._models.other_tables, strict=False)
            tables.update(others)
        return tables

    @cached_property
    def _statements(self) -> dict[str, Select[Any]]:
        return {
            name: prune_results(self._models)
            if name == "results"
            else prune_stale(self._models, table)
            for name, table in self._tables.items()
        }


def _pruned(deleted: Mapping[str, int], *, is_complete: bool) -> Pruned:
    return Pruned(
        deleted["results"], deleted.get("progress", 0), deleted.get("status", 0), is_complete
    )


class _Rest:
    """How much may still be done: so many `rows`, None for any number."""

    def __init__(self, rows: int | None, time_budget: float | None) -> None:
        self.rows = rows
        self._deadline = inf if time_budget is None else time.monotonic() + time_budget
        self.was_too_little = False

    def has_more(self) -> bool:
        """Whether a further slice may be begun."""
        self.was_too_little = self.rows == 0 or time.monotonic() >= self._deadline
        return not self.was_too_little


def check_limits(limit: int | None, time_budget: Seconds | None) -> float | None:
    """The time budget in seconds.

    Raises:
        ConfigurationError: One of them cannot be.
    """
    check_whole("limit", limit, or_none=True)
    return check_seconds("time_budget", time_budget)
