"""Results that are deleted when they are read: each result reaches exactly one reader."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from sqlalchemy import CursorResult, Insert, Select
from sqlalchemy.ext.asyncio import AsyncConnection
from taskiq import TaskiqResult

from taskiq_sa_pg.background import start_task
from taskiq_sa_pg.batching import Batcher, Entry
from taskiq_sa_pg.database import CONVERSION_ERRORS, Database
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.statements import (
    MAX_IDS,
    StoredResult,
    in_slices,
    put_back,
    take_results,
    taken_columns,
)
from taskiq_sa_pg.telemetry import BatchMeter
from taskiq_sa_pg.waiting import Notifier

logger = logging.getLogger(__name__)


_Failures = dict[Any, TaskiqResult[Any]]


class Taken(NamedTuple):
    """A result with its log, and the deleted rows, by column."""

    result: TaskiqResult[Any]
    row: Mapping[str, Any]
    progress: Mapping[str, Any] | None  # the row of the progress, if any


class Taker:
    """Reads, deletes and decodes results in one transaction.

    If the caller is cancelled before the COMMIT, the result is not deleted. If it is cancelled
    later, the result and its progress are stored again. A result is lost only if the process ends
    in between.
    """

    def __init__(
        self, settings: Settings, database: Database, meter: BatchMeter, notifier: Notifier | None
    ) -> None:
        self._settings = settings
        self._models = settings.models
        self._codec = settings.codec
        self._database = database
        self._notifier = notifier
        self._under_way: set[asyncio.Task[Any]] = set()
        self._batcher: Batcher[Any, None, None, Taken] = Batcher(
            self._take_wanted,
            encode=lambda *_: None,
            max_rows=MAX_IDS,
            on_unclaimed=lambda _, taken: self.put_back([taken]),
            meter=meter,
        )

    async def one(self, column_id: Any) -> Taken | None:
        """Returns a result, None if there is none; only one of several callers gets it."""
        return await self._batcher.submit(column_id, None)

    async def many(self, column_ids: Collection[Any]) -> tuple[dict[Any, Taken], _Failures]:
        """Deletes and returns all existing results or none, and failures.

        A failure has the ResultDecodeError of a result that cannot be decoded and is not deleted.

        Raises:
            CancelledError: The caller was cancelled; deleted results are stored again.
        """
        has_caller = True
        failures: _Failures = {}
        decode = partial(self._codec.decode_any, failures=failures, with_logs=True)

        def is_wanted(column_id: Any) -> bool:
            return has_caller and column_id not in failures

        # In a separate task, which is not cancelled with the caller.
        taking = start_task(self._take(column_ids, is_wanted, decode))
        self._under_way.add(taking)
        taking.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(taking), failures
        except asyncio.CancelledError:
            has_caller = False
            taking.add_done_callback(self._put_back_all)
            raise

    def put_back(self, unclaimed: Collection[Taken]) -> None:
        """Stores results again that no caller received, in the background."""
        returning = start_task(self._store_again(unclaimed))
        self._under_way.add(returning)
        returning.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        """Rejects further calls, and returns when earlier calls are complete."""
        await self._batcher.close()
        while self._under_way:
            await asyncio.wait(self._under_way)
            await asyncio.sleep(0)  # callbacks of ended tasks may begin to put back

    @cached_property
    def _take_results(self) -> Select[Any]:
        return take_results(self._models, is_tracked=self._settings.is_tracked)

    @cached_property
    def _columns(self) -> tuple[Sequence[str], Sequence[str]]:
        return taken_columns(self._models)

    @cached_property
    def _inserts(self) -> tuple[Insert, Insert]:
        return put_back(self._models.results_table), put_back(self._models.progress_table)

    async def _take_wanted(self, batch: Mapping[Any, Entry[None]]) -> Mapping[Any, Taken]:
        decode = partial(self._codec.decode_result, with_logs=True)
        return await self._take(batch, lambda column_id: batch[column_id].is_wanted, decode)

    async def _take(
        self,
        column_ids: Collection[Any],
        is_wanted: Callable[[Any], bool],
        decode: Callable[[StoredResult], TaskiqResult[Any]],
    ) -> dict[Any, Taken]:
        async def take(connection: AsyncConnection) -> dict[Any, Taken] | None:
            found: dict[Any, Taken] = {}
            for some in in_slices([column_id for column_id in column_ids if is_wanted(column_id)]):
                rows = await connection.execute(self._take_results, {"task_ids": some})
                # Before the commit: what cannot be decoded is not deleted.
                found |= {row[0]: self._taken(row, decode) for row in self._read(rows, some)}
            if all(map(is_wanted, found)):
                return found
            # For example, a caller was cancelled meanwhile: its result is not deleted.
            await connection.rollback()
            return None

        purpose = f"take results from table {self._settings.table}"
        taken: dict[Any, Taken] | None = None
        while taken is None and any(map(is_wanted, column_ids)):
            # Not retried if the COMMIT may have succeeded: the retry would find no results.
            taken = await self._database.transact(take, purpose, is_answer_final=True)
        return taken or {}

    def _read(self, rows: CursorResult[Any], column_ids: Sequence[Any]) -> Sequence[Any]:
        try:
            return rows.all()
        except CONVERSION_ERRORS as exc:  # from the type of an application's own column
            task_id = column_ids[0] if len(column_ids) == 1 else None
            raise self._codec.decode_error(task_id, exc) from exc

    def _taken(
        self, row: Sequence[Any], decode: Callable[[StoredResult], TaskiqResult[Any]]
    ) -> Taken:
        of_result, of_progress = self._columns
        result = decode(StoredResult._make(row[: len(StoredResult._fields)]))
        values, others = row[: len(of_result)], row[len(of_result) :]
        progress = dict(zip(of_progress, others, strict=True))
        return Taken(
            result,
            dict(zip(of_result, values, strict=True)),
            None if progress["task_id"] is None else progress,
        )

    def _put_back_all(self, taking: asyncio.Task[dict[Any, Taken]]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self.put_back(taking.result().values())

    async def _store_again(self, unclaimed: Collection[Taken]) -> None:
        insert_result, insert_progress = self._inserts
        # In the order in which other statements lock rows.
        rows = sorted(unclaimed, key=lambda taken: taken.row["task_id"])
        task_ids = [taken.row["task_id"] for taken in rows]

        async def insert(connection: AsyncConnection) -> None:
            for taken in rows:
                await connection.execute(insert_result, taken.row)
                if taken.progress is not None:
                    await connection.execute(insert_progress, taken.progress)

        try:
            await self._database.transact(insert, "store results of cancelled readers again")
        except TaskiqSaPgError:
            logger.exception("the results of tasks %s are lost", ", ".join(map(str, task_ids)))
        else:
            if self._notifier is not None:
                self._notifier.announce(self._models.config.results_channel, task_ids)
