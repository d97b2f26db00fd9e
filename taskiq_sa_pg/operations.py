"""The operations on one results table, gathered: what is asked for at once shares a statement."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.batching import Batcher, Entry, blames_a_row
from taskiq_sa_pg.codec import Codec, attempt_of
from taskiq_sa_pg.exceptions import StorageError, TaskiqSaPgError
from taskiq_sa_pg.extras import ExtendedRow, ExtendedUpserts, ExtraValues
from taskiq_sa_pg.faults import CONVERSION_ERRORS, describe, is_transient
from taskiq_sa_pg.layout import Layout
from taskiq_sa_pg.notifications import Notifier
from taskiq_sa_pg.rows import Features, ProgressRow, ResultRow, StoredProgress, StoredResult
from taskiq_sa_pg.statements import MAX_IDS_PER_READ, Statements
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.telemetry import BatchMeter, Telemetry
from taskiq_sa_pg.upserts import Call

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# The result and the extra values.
_Extended = tuple[TaskiqResult[Any], Mapping[str, Any]]


class Operations:
    """Stores and reads through batchers; made for one event loop.

    Task ids come as the column has them, beside those that were given, which errors name.

    Args:
        store: Where the statements run.
        codec: How values become rows.
        layout: The tables.
        notifier: Told of what was committed.
        extra_values: Asked for the values of the application's own columns.
        telemetry: Counts what is done.
    """

    def __init__(
        self,
        store: Store,
        codec: Codec,
        layout: Layout,
        notifier: Notifier | None,
        *,
        extra_values: ExtraValues | None,
        telemetry: Telemetry,
    ) -> None:
        meters = telemetry.meters
        self._store = store
        self._codec = codec
        self._layout = layout
        config = layout.models.config
        self._table = config.qualified_name
        self._results_channel = config.results_channel
        self._progress_channel = config.progress_channel
        self._purpose = f"store its result in table {self._table}"
        self._notifier = notifier
        self._results: Batcher[Any, TaskiqResult[Any], ResultRow, None] = Batcher(
            self._store_results,
            encode=codec.encode_result,
            meter=meters["set_result"],
            size=_size_of,
            rank=_rank_of,
        )
        self._extra_values = extra_values
        self._extended_by_features: dict[Features, ExtendedUpserts] = {}
        self._extended: Batcher[Any, _Extended, ExtendedRow, None] = Batcher(
            self._store_extended,
            encode=lambda column_id, item: ExtendedRow(
                codec.encode_result(column_id, item[0]), item[1]
            ),
            meter=meters["set_result"],
            size=lambda row: _size_of(row.result) + sum(map(_length_of, row.extra.values())),
            rank=lambda item: _rank_of(item[0]),
        )
        self._progress: Batcher[Any, TaskProgress[Any], ProgressRow, None] = Batcher(
            self._store_progress,
            encode=codec.encode_progress,
            meter=meters["set_progress"],
            size=lambda row: len(row.meta or ""),
        )
        self._ready: Batcher[Any, str, str, bool] = _reader(
            self._find_ready, meters["is_result_ready"]
        )
        self._results_read: Batcher[Any, str, str, StoredResult] = _reader(
            self._read_results, meters["get_result"]
        )
        self._results_taken: Batcher[Any, str, str, TaskiqResult[Any]] = _reader(
            self._take_results, meters["get_result"], is_shared=False
        )
        self._progress_read: Batcher[Any, str, str, StoredProgress] = _reader(
            self._read_progress, meters["get_progress"]
        )

    @property
    def _statements(self) -> Statements:
        return self._layout.statements

    @property
    def _extended_upserts(self) -> ExtendedUpserts:
        layout = self._layout
        if layout.features not in self._extended_by_features:
            self._extended_by_features[layout.features] = ExtendedUpserts(
                layout.models, layout.features, is_tracked=layout.is_tracked
            )
        return self._extended_by_features[layout.features]

    async def close(self) -> None:
        """Refuses further calls, and returns when those before have been answered."""
        await asyncio.gather(
            *[
                batcher.close()
                for batcher in (
                    *(self._results, self._extended, self._progress, self._ready),
                    *(self._results_read, self._results_taken, self._progress_read),
                )
            ]
        )

    def set_result(
        self, column_id: Any, task_id: str, result: TaskiqResult[Any]
    ) -> Awaitable[None]:
        """Stores a result, with the values that the application has for its own columns."""
        if self._extra_values is None:
            return self._results.submit(column_id, result, task_id)
        # Here, where the caller's context is.
        extra = self._extra_values.of(task_id, result)
        return self._extended.submit(column_id, (result, extra), task_id)

    def set_progress(
        self, column_id: Any, task_id: str, progress: TaskProgress[Any]
    ) -> Awaitable[None]:
        """Stores progress."""
        return self._progress.submit(column_id, progress, task_id)

    async def is_ready(self, column_id: Any, task_id: str) -> bool:
        """Whether there is a result."""
        return bool(await self._ready.submit(column_id, task_id, task_id))

    def read(self, column_id: Any, task_id: str) -> Awaitable[StoredResult | None]:
        """The row of a result."""
        return self._results_read.submit(column_id, task_id, task_id)

    def take(self, column_id: Any, task_id: str) -> Awaitable[TaskiqResult[Any] | None]:
        """A result with its log, deleted as it was read; of several callers one gets it."""
        return self._results_taken.submit(column_id, task_id, task_id)

    def read_progress(self, column_id: Any, task_id: str) -> Awaitable[StoredProgress | None]:
        """The row of a progress."""
        return self._progress_read.submit(column_id, task_id, task_id)

    async def _store_results(self, batch: Mapping[Any, Entry[ResultRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        layout = self._layout
        is_stored = False
        while not is_stored:  # as Layout.adapting(), which would be two more coroutines
            features = layout.features
            try:
                await self._upsert(layout.statements.upsert_results.of(rows), self._purpose)
                is_stored = True
            except StorageError as exc:
                layout.adapt_to(exc, features, uses_status=layout.is_tracked)
        if self._notifier is not None:
            self._notifier.announce(self._results_channel, batch)
        return {}

    async def _store_extended(self, batch: Mapping[Any, Entry[ExtendedRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        try:
            await self._upsert_extended(rows)
        except StorageError as exc:
            if blames_a_row(exc) and len(rows) > 1:
                raise  # the batcher tries it in halves
            await self._upsert_without_extra(rows, exc)
        if self._notifier is not None:
            self._notifier.announce(self._results_channel, batch)
        return {}

    async def _upsert_extended(self, rows: Sequence[ExtendedRow]) -> None:
        try:
            await self._layout.adapting(
                lambda: self._upsert(self._extended_upserts.of(rows), self._purpose),
                uses_status=self._layout.is_tracked,
            )
        except TaskiqSaPgError:
            raise
        except CONVERSION_ERRORS as exc:
            text, _ = describe(exc, self._purpose)
            raise StorageError(text, None) from exc

    async def _upsert_without_extra(
        self, rows: Sequence[ExtendedRow], refusal: StorageError
    ) -> None:
        """Stores results without their extra values, where it may be those that were refused."""
        extended = [row.result.task_id for row in rows if row.extra]
        cause = refusal.__cause__
        if not extended or (isinstance(cause, Exception) and is_transient(cause)):
            raise refusal
        await self._upsert_extended([row._replace(extra={}) for row in rows])
        for task_id in extended:
            logger.error("task %s: its result goes without its extra_values: %s", task_id, refusal)

    async def _store_progress(self, batch: Mapping[Any, Entry[ProgressRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        await self._upsert(
            self._statements.upsert_progress.of(rows),
            f"store its progress in table {self._table}_progress",
        )
        if self._notifier is not None:
            self._notifier.announce(self._progress_channel, batch)
        return {}

    def _upsert(self, calls: Sequence[Call], purpose: str) -> Awaitable[object]:
        if len(calls) == 1:
            [(statement, parameters)] = calls
            return self._store.fetch(statement, parameters, purpose)

        async def upsert(connection: AsyncConnection) -> None:
            for call in calls:
                await connection.execute(*call)

        # All or none: those that are tried again may have been read and deleted meanwhile.
        return self._store.transact(upsert, purpose)

    async def find_ready(self, column_ids: Iterable[Any]) -> set[Any]:
        """Those of the tasks that have a result, in one statement however many there are."""
        rows = await self._store.fetch(
            self._statements.select_ready,
            {"task_ids": list(column_ids)},
            f"look for results in table {self._table}",
        )
        return {column_id for (column_id,) in rows}

    async def _find_ready(self, batch: Mapping[Any, Entry[str]]) -> Mapping[Any, bool]:
        return dict.fromkeys(await self.find_ready(batch), True)

    async def read_all(self, column_ids: Iterable[Any]) -> dict[Any, StoredResult]:
        """The rows of results, by id, in one statement for every 200 ids."""
        rows: dict[Any, StoredResult] = {}
        for asked in _slices(list(column_ids)):
            found = await self._store.fetch(
                self._statements.select_results,
                {"task_ids": asked},
                f"read results in table {self._table}",
            )
            rows.update((row[0], StoredResult._make(row)) for row in found)
        return rows

    async def take_all(self, task_ids: Mapping[Any, str]) -> dict[Any, TaskiqResult[Any]]:
        """Results with their logs, by id as the column has it, deleted as they were read.

        All or, where one of them cannot be read back, none: it is one transaction.
        """
        return await self._take(task_ids, lambda _: True)

    async def _take_results(
        self, batch: Mapping[Any, Entry[str]]
    ) -> Mapping[Any, TaskiqResult[Any]]:
        task_ids = {column_id: entry.row for column_id, entry in batch.items()}
        return await self._take(task_ids, lambda column_id: batch[column_id].is_wanted)

    async def _take(
        self, task_ids: Mapping[Any, str], is_wanted: Callable[[Any], bool]
    ) -> dict[Any, TaskiqResult[Any]]:
        async def take(connection: AsyncConnection) -> dict[Any, TaskiqResult[Any]] | None:
            results: dict[Any, TaskiqResult[Any]] = {}
            for some in _slices([column_id for column_id in task_ids if is_wanted(column_id)]):
                taken = await connection.execute(self._statements.take_results, {"task_ids": some})
                # Before the commit: what cannot be decoded is not deleted.
                for row in map(StoredResult._make, taken.all()):
                    results[row.task_id] = self._codec.decode_result(
                        task_ids[row.task_id], row, with_logs=True
                    )
            if all(map(is_wanted, results)):
                return results
            # A caller went away meanwhile: its result stays for another.
            await connection.rollback()
            return None

        results: dict[Any, TaskiqResult[Any]] | None = None
        while results is None and any(map(is_wanted, task_ids)):
            # Where the COMMIT may have been carried out, a second reading might find nothing.
            results = await self._store.transact(
                take, f"take results from table {self._table}", is_answer_final=True
            )
        return results or {}

    async def _read_results(self, batch: Mapping[Any, Entry[str]]) -> Mapping[Any, StoredResult]:
        return await self.read_all(batch)

    async def _read_progress(self, batch: Mapping[Any, Entry[str]]) -> Mapping[Any, StoredProgress]:
        rows = await self._store.fetch(
            self._statements.select_progress,
            {"task_ids": list(batch)},
            f"read its progress in table {self._table}_progress",
        )
        return {row[0]: StoredProgress._make(row) for row in rows}


def _reader(
    flush: Callable[[Mapping[Any, Entry[str]]], Awaitable[Mapping[Any, _T]]],
    meter: BatchMeter,
    *,
    is_shared: bool = True,
) -> Batcher[Any, str, str, _T]:
    return Batcher(
        flush,
        encode=lambda _, task_id: task_id,
        max_rows=MAX_IDS_PER_READ,
        is_shared=is_shared,
        meter=meter,
    )


def _rank_of(result: TaskiqResult[Any]) -> int:
    return attempt_of(getattr(result, "labels", None))


def _size_of(row: ResultRow) -> int:
    size = len(row.return_value) + len(row.labels)
    if row.args is not None or row.kwargs is not None:
        size += len(row.args or "") + len(row.kwargs or "")
    if row.error is None and row.log is None:
        return size
    return size + sum(map(len, filter(None, (row.error, row.traceback, row.log))))


def _length_of(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else 0


def _slices(column_ids: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(column_ids), MAX_IDS_PER_READ):
        yield column_ids[start : start + MAX_IDS_PER_READ]
