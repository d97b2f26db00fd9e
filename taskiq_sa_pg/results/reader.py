"""Reads results and progress; concurrent calls share a statement."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

from sqlalchemy import Select
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.batching import Batcher
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.results.taking import Taker
from taskiq_sa_pg.statements import (
    MAX_IDS,
    StoredProgress,
    StoredResult,
    in_slices,
    select_progress,
    select_ready,
    select_results,
)
from taskiq_sa_pg.telemetry import BatchMeter, Telemetry
from taskiq_sa_pg.waiting import Notifier

_Answer = TypeVar("_Answer")


class Lookup(Generic[_Answer]):
    """Runs a select for task ids and returns its answers by id (as the column stores ids).

    Args:
        database: Runs the select.
        build: Builds the select, when it is first needed.
        answer: Converts a row, whose first column is the id, to an answer.
        purpose: What failed, for error messages.
        meter: Counts calls and batches.
        lanes: Maximum number of concurrent statements.
    """

    def __init__(
        self,
        database: Database,
        build: Callable[[], Select[Any]],
        answer: Callable[[Sequence[Any]], _Answer],
        purpose: str,
        meter: BatchMeter,
        *,
        lanes: int = 2,
    ) -> None:
        self._database = database
        self._build = build
        self._answer = answer
        self._purpose = purpose
        self._batcher: Batcher[Any, None, None, _Answer] = Batcher(
            self.at_once, encode=lambda *_: None, max_rows=MAX_IDS, lanes=lanes, meter=meter
        )

    @cached_property
    def _statement(self) -> Select[Any]:
        return self._build()

    async def one(self, column_id: Any) -> _Answer | None:
        """Returns the answer for one id, None if there is none."""
        return await self._batcher.submit(column_id, None)

    async def many(self, column_ids: Collection[Any]) -> dict[Any, _Answer]:
        """Returns all existing answers, with one statement for every 200 ids."""
        answers: dict[Any, _Answer] = {}
        for some in in_slices(list(column_ids)):
            answers |= await self.at_once(some)
        return answers

    async def at_once(self, column_ids: Collection[Any]) -> dict[Any, _Answer]:
        """The same in one statement for any number of ids."""
        parameters = {"task_ids": list(column_ids)}
        rows = await self._database.fetch(self._statement, parameters, self._purpose)
        return {row[0]: self._answer(row) for row in rows}

    async def close(self) -> None:
        """Rejects further calls, and returns when earlier calls are complete."""
        await self._batcher.close()


class Reader:
    """Reads results and progress; deletes results when they are read, unless they are kept.

    For one event loop. Task ids are values of the task-id column.

    All methods raise:
        ResultDecodeError: A value cannot be decoded.
        StorageError: PostgreSQL rejected a statement or is unreachable.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        telemetry: Telemetry,
        notifier: Notifier | None,
    ) -> None:
        meters, models, table = telemetry.meters, settings.models, settings.table
        config = models.config
        self._database = database
        self._codec = settings.codec
        self.keep_results = settings.keep_results
        self._ready: Lookup[bool] = Lookup(
            database,
            partial(select_ready, models),
            lambda _: True,
            f"look for results in table {table}",
            meters["is_result_ready"],
            lanes=1,  # many clients poll; with two lanes half as many calls would share a statement
        )
        self._results: Lookup[StoredResult] = Lookup(
            database,
            partial(select_results, models),
            StoredResult._make,
            f"read results in table {table}",
            meters["get_result"],
        )
        self._progress: Lookup[StoredProgress] = Lookup(
            database,
            partial(select_progress, models),
            StoredProgress._make,
            f"read its progress in table {config.qualified(config.progress_table_name)}",
            meters["get_progress"],
        )
        self._taker = Taker(settings, database, meters["get_result"], notifier)

    async def is_ready(self, column_id: Any) -> bool:
        """Whether the task has a result."""
        return await self._ready.one(column_id) is not None

    async def find_ready(self, column_ids: Collection[Any]) -> set[Any]:
        """Returns the tasks that have a result, in one statement for any number of tasks."""
        return set(await self._ready.at_once(column_ids))

    async def get(self, column_id: Any, with_logs: bool) -> TaskiqResult[Any] | None:
        """Returns a result, None if there is none; if it is not kept, only one caller gets it."""
        if not self.keep_results:
            taken = await self._taker.one(column_id)
            if taken is None:
                return None
            if not with_logs:
                taken.result.log = None
            return taken.result
        row = await self._results.one(column_id)
        return None if row is None else self._codec.decode_result(row, with_logs=with_logs)

    async def get_all(
        self, column_ids: Collection[Any], with_logs: bool, *, needs_every: bool = False
    ) -> dict[Any, TaskiqResult[Any]]:
        """Returns the existing results. If results are not kept, deletes all of them or none.

        With `needs_every`, deleted results are stored again if some are missing. A result that
        cannot be decoded is a failure with the ResultDecodeError, and is not deleted.
        """
        codec = self._codec
        if self.keep_results:
            rows = await self._results.many(column_ids)
            return {c: codec.decode_any(row, with_logs=with_logs) for c, row in rows.items()}
        taken, failures = await self._taker.many(column_ids)
        if needs_every and len(taken) + len(failures) < len(column_ids):
            self._taker.put_back(taken.values())
        results = {column_id: each.result for column_id, each in taken.items()} | failures
        if not with_logs:
            for result in results.values():
                result.log = None
        return results

    async def read_progress(self, column_id: Any) -> StoredProgress | None:
        """Returns the row of a progress, None if there is none."""
        return await self._progress.one(column_id)

    def decode_progress(self, row: StoredProgress) -> TaskProgress[Any]:
        """Returns the progress of a row."""
        return self._codec.decode_progress(row)

    async def close(self) -> None:
        """Rejects further calls, and returns when earlier calls are complete."""
        await asyncio.gather(
            self._ready.close(), self._results.close(), self._progress.close(), self._taker.close()
        )
