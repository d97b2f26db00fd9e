"""Reading results and progress, gathered: what is asked for at once shares a statement."""

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
    """What a select says of task ids, by id as the column has it.

    Args:
        database: Where it runs.
        build: Builds the select, when it is first needed.
        answer: Makes an answer of a row, of which the first column is the id.
        purpose: What errors say could not be done.
        meter: Counts calls and batches.
        lanes: The most statements at a time.
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
        """The answer for one id, None if there is none."""
        return await self._batcher.submit(column_id, None)

    async def many(self, column_ids: Collection[Any]) -> dict[Any, _Answer]:
        """The answers that there are, in one statement for every 200 ids."""
        answers: dict[Any, _Answer] = {}
        for some in in_slices(list(column_ids)):
            answers |= await self.at_once(some)
        return answers

    async def at_once(self, column_ids: Collection[Any]) -> dict[Any, _Answer]:
        """The same in one statement, however many ids there are."""
        parameters = {"task_ids": list(column_ids)}
        rows = await self._database.fetch(self._statement, parameters, self._purpose)
        return {row[0]: self._answer(row) for row in rows}

    async def close(self) -> None:
        """Refuses further calls, and returns when those before have been answered."""
        await self._batcher.close()


class Reader:
    """Reads what was stored, and deletes results as they are read unless they are kept.

    Made for one event loop. Task ids come as the column has them.

    Raises everywhere:
        ResultDecodeError: A value cannot be read back.
        StorageError: PostgreSQL could not be asked.
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
            lanes=1,  # many wait by asking again and again, and with two half as many would share
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
        """Whether there is a result."""
        return await self._ready.one(column_id) is not None

    async def find_ready(self, column_ids: Collection[Any]) -> set[Any]:
        """Those of the tasks that have a result, in one statement however many there are."""
        return set(await self._ready.at_once(column_ids))

    async def get(self, column_id: Any, with_logs: bool) -> TaskiqResult[Any] | None:
        """A result, None if there is none; of several callers one gets what is not kept."""
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
        """The results that are there; of those that are not kept, all or none are taken.

        What was taken goes back if it `needs_every` one and some are not there. What cannot be read
        back is a failure with the ResultDecodeError, and is not taken.
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
        """The row of a progress, None if there is none."""
        return await self._progress.one(column_id)

    def decode_progress(self, row: StoredProgress) -> TaskProgress[Any]:
        """The progress of a row."""
        return self._codec.decode_progress(row)

    async def close(self) -> None:
        """Refuses further calls, and returns when those before have been answered."""
        await asyncio.gather(
            self._ready.close(), self._results.close(), self._progress.close(), self._taker.close()
        )
