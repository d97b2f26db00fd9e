"""Deleting what has expired: on demand, and in the background of workers."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Select

from taskiq_sa_pg.exceptions import ConfigurationError, StorageError
from taskiq_sa_pg.layout import Layout
from taskiq_sa_pg.listener import end
from taskiq_sa_pg.prune_statements import PruneStatements, ResultsSlice, StaleSlice
from taskiq_sa_pg.retention import Seconds, check_seconds
from taskiq_sa_pg.rows import Features
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.telemetry import Telemetry

logger = logging.getLogger(__name__)

# Few enough that those who store results meanwhile hardly notice: with ten times as many their
# slowest calls took thrice as long as without, and pauses between the slices did not help.
_ROWS_IN_SLICE: Final = 100


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


class Pruning:
    """Prunes one results table and those that go with it.

    Args:
        store: Where the statements run.
        layout: The tables.
        progress_ttl: After how many seconds progress and status are deleted of a task that has no
            result; None keeps them.
        telemetry: Counts what is deleted.
        is_exclusive: Whether to leave everything to another process that is at it.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        progress_ttl: float | None,
        telemetry: Telemetry,
        *,
        is_exclusive: bool,
    ) -> None:
        self._store = store
        self._layout = layout
        self._progress_ttl = progress_ttl
        self._telemetry = telemetry
        self._is_exclusive = is_exclusive
        self._by_features: dict[Features, PruneStatements] = {}
        self._purpose = f"prune table {layout.models.config.qualified_name}"

    @property
    def _statements(self) -> PruneStatements:
        features = self._layout.features
        if features not in self._by_features:
            self._by_features[features] = PruneStatements(
                self._layout.models, features, is_exclusive=self._is_exclusive
            )
        return self._by_features[features]

    async def run(self, limit: int | None = None, time_budget: float | None = None) -> Pruned:
        """Deletes what has expired, a slice after the other.

        Args:
            limit: How many rows at most, progress and status of deleted results aside.
            time_budget: After how many seconds no further slice is begun.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        with self._telemetry.pruning():
            return await self._run(_Rest(limit, time_budget))

    async def _run(self, rest: "_Rest") -> Pruned:
        results = await self._prune_all_results(rest)
        progress = statuses = 0
        if self._progress_ttl is not None:
            progress = await self._prune_all_stale(rest, self._statements.progress, "progress")
            if self._layout.features.has_status:
                statuses = await self._prune_all_stale(rest, self._statements.statuses, "status")
        return Pruned(results, progress, statuses, not rest.was_too_little)

    async def _prune_all_results(self, rest: "_Rest") -> int:
        deleted, start = 0, None
        while size := rest.next_slice():
            parameters = {"size": size, "start": start}
            done = ResultsSlice._make(await self._prune_some_results(parameters))
            self._telemetry.note_pruned("results", done.deleted)
            rest.take(done.deleted)
            deleted += done.deleted
            start = done.last
            if done.deleted < size:
                break
        return deleted

    async def _prune_some_results(self, parameters: dict[str, Any]) -> Any:
        def prune() -> Awaitable[Any]:
            return self._one(self._statements.results, parameters)

        return await self._layout.adapting(prune, uses_status=True)

    async def _prune_all_stale(self, rest: "_Rest", statement: Select[Any], rows_of: str) -> int:
        deleted, start = 0, None
        while most := rest.next_slice():
            parameters = {
                "size": _ROWS_IN_SLICE,
                "most": most,
                "seconds": self._progress_ttl,
                "start": start,
            }
            done = StaleSlice._make(await self._one(statement, parameters))
            self._telemetry.note_pruned(rows_of, done.deleted)
            rest.take(done.deleted)
            deleted += done.deleted
            start = done.last
            if done.looked_at < _ROWS_IN_SLICE:
                break
        return deleted

    async def _one(self, statement: Select[Any], parameters: dict[str, Any]) -> Any:
        [row] = await self._store.fetch(statement, parameters, self._purpose)
        return row


class _Rest:
    """How much may still be done."""

    def __init__(self, limit: int | None, time_budget: float | None) -> None:
        self._rows = limit
        self._deadline = None if time_budget is None else time.monotonic() + time_budget
        self.was_too_little = False

    def next_slice(self) -> int:
        """How many rows may be deleted next; 0 if it is enough."""
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        if is_late or self._rows == 0:
            self.was_too_little = True
            return 0
        return _ROWS_IN_SLICE if self._rows is None else min(self._rows, _ROWS_IN_SLICE)

    def take(self, rows: int) -> None:
        """Notes what was deleted."""
        if self._rows is not None:
            self._rows -= rows


class Pruner:
    """Prunes at regular times, from the first start() on.

    Args:
        pruning: What to run; nothing is done while another process is at it.
        interval: Seconds between two runs, give or take a tenth.
    """

    def __init__(self, pruning: Pruning, interval: float) -> None:
        self._pruning = pruning
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Begins, unless it has."""
        if self._task is None and not self._is_closed:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends it."""
        self._is_closed = True
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        # Not all processes at once, which may have started together.
        await asyncio.sleep(self._interval * random.random())  # noqa: S311 - no secret
        while True:
            try:
                pruned = await self._pruning.run(time_budget=self._interval)
            except StorageError as exc:
                logger.warning("%s; it is tried again in %g s", exc, self._interval)
            else:
                if pruned.results or pruned.progress or pruned.statuses:
                    logger.info("pruned: %s", pruned)
            await asyncio.sleep(self._interval * random.uniform(0.9, 1.1))  # noqa: S311 - as above


def check_limits(limit: int | None, time_budget: Seconds | None) -> float | None:
    """The time budget in seconds.

    Raises:
        ConfigurationError: One of them cannot be.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ConfigurationError(f"limit must be 1 or more, or None, not {limit!r}")
    return check_seconds("time_budget", time_budget)
