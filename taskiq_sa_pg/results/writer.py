"""Stores results and progress; concurrent calls share a statement."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.batching import Batcher, Entry, blames_a_row
from taskiq_sa_pg.codec import attempt_of, qualified_name, reason_of, task_metadata_of
from taskiq_sa_pg.database import CONVERSION_ERRORS, Database, describe, is_transient
from taskiq_sa_pg.exceptions import ResultSerializationError, StorageError, TaskiqSaPgError
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.statements import (
    ExtendedRow,
    ExtendedUpserts,
    ProgressRow,
    ResultRow,
    Upsert,
    upsert_progress,
    upsert_results,
)
from taskiq_sa_pg.telemetry import Telemetry
from taskiq_sa_pg.waiting import Notifier
from taskiq_sa_pg.window import Window

logger = logging.getLogger(__name__)

# SQLSTATE. https://www.postgresql.org/docs/18/errcodes-appendix.html
_PROGRAM_LIMIT_EXCEEDED: Final = "54000"

# Number of task ids in a message.
_MAX_SHOWN: Final = 5

# A result and the values for the application's own columns.
_Extended = tuple[TaskiqResult[Any], Mapping[str, Any]]


class Writer:
    """Stores results and progress, and passes committed ids to the notifier.

    For one event loop. Task ids are values of the task-id column.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        telemetry: Telemetry,
        notifier: Notifier | None,
    ) -> None:
        self._database = database
        self._notifier = notifier
        self._codec = codec = settings.codec
        self._models = settings.models
        self._extra_values = settings.extra_values
        self._is_tracked = settings.is_tracked
        # Until a TaskMetadataMiddleware is active, or a warning was logged.
        self.awaits_middleware = settings.is_tracked
        self.by_values = False  # whether statements pass rows as VALUES
        self._purpose = f"store its result in table {settings.table}"
        meters = telemetry.meters
        self._results: Batcher[Any, TaskiqResult[Any], ResultRow, None] = Batcher(
            self._store_results,
            encode=codec.encode_result,
            size=_size_of,
            rank=_rank_of,
            window=Window(settings.gather_window),
            meter=meters["set_result"],
        )
        self._extended: Batcher[Any, _Extended, ExtendedRow, None] = Batcher(
            self._store_extended,
            encode=self._encode_extended,
            size=lambda row: sum(len(v) for v in row.values() if isinstance(v, bytes | str)),
            rank=lambda item: _rank_of(item[0]),
            window=Window(settings.gather_window),
            meter=meters["set_result"],
        )
        self._progress: Batcher[Any, TaskProgress[Any], ProgressRow, None] = Batcher(
            self._store_progress,
            encode=codec.encode_progress,
            size=lambda row: len(row.meta or ""),
            window=Window(settings.gather_window),
            meter=meters["set_progress"],
        )

    async def set_result(self, column_id: Any, task_id: str, result: TaskiqResult[Any]) -> None:
        """Stores a result, with the application's values for its own columns.

        extra_values is called with `task_id`. A result that PostgreSQL rejects as too large is
        stored as an error result.

        Raises:
            StorageError: PostgreSQL rejected it or is unreachable.
        """
        if self.awaits_middleware:
            self._warn_of_no_middleware(task_id)
        try:
            await self._submit(column_id, task_id, result)
        except StorageError as exc:
            if exc.sqlstate != _PROGRAM_LIMIT_EXCEEDED:
                raise
            # For example, jsonb may be larger than JSON text. Waiting clients must get an answer.
            logger.error("%s; an error result is stored instead", exc)  # noqa: TRY400 - the text is enough
            kind = qualified_name(type(result.return_value))
            error = ResultSerializationError("the return value", kind, reason_of(exc))
            failure = {"is_err": True, "return_value": None, "error": error}
            await self._submit(column_id, task_id, result.model_copy(update=failure))

    async def _submit(self, column_id: Any, task_id: str, result: TaskiqResult[Any]) -> None:
        if self._extra_values is None:
            await self._results.submit(column_id, result)
        else:
            # Here, in the caller's context.
            extra = self._extra_values.of(task_id, result)
            await self._extended.submit(column_id, (result, extra))

    async def set_progress(self, column_id: Any, progress: TaskProgress[Any]) -> None:
        """Stores progress."""
        await self._progress.submit(column_id, progress)

    async def store_missing(
        self,
        find: Callable[[AsyncConnection], Awaitable[Mapping[Any, TaskiqResult[Any]]]],
        purpose: str,
        retry_timeout: float,
    ) -> list[Any]:
        """Stores the results that `find` returns if there are none yet, in one transaction.

        Returns:
            The task ids of the stored results.

        Raises:
            StorageError: PostgreSQL rejected a statement or is unreachable.
        """

        async def work(connection: AsyncConnection) -> list[Any]:
            rows = [
                self._encode_extended(column_id, (result, self._extra_of(str(column_id), result)))
                for column_id, result in (await find(connection)).items()
            ]
            stored: list[Any] = []
            for call in self._insert_missing.of(rows):
                result = await connection.execute(*call)
                stored += result.scalars() if result.returns_rows else ()
            return stored

        stored = await self._database.transact(work, purpose, retry_timeout=retry_timeout)
        if stored and self._notifier is not None:
            self._notifier.announce(self._models.config.results_channel, stored)
        return stored

    async def close(self) -> None:
        """Rejects further calls, and returns when earlier calls are complete."""
        await asyncio.gather(self._results.close(), self._extended.close(), self._progress.close())

    @cached_property
    def _upsert_results(self) -> Upsert:
        return upsert_results(self._models, is_tracked=self._is_tracked, by_values=self.by_values)

    @cached_property
    def _upsert_extended(self) -> ExtendedUpserts:
        return ExtendedUpserts(self._models, is_tracked=self._is_tracked, by_values=self.by_values)

    @cached_property
    def _insert_missing(self) -> ExtendedUpserts:
        return ExtendedUpserts(
            self._models, is_tracked=self._is_tracked, if_missing=True, by_values=self.by_values
        )

    @cached_property
    def _upsert_progress(self) -> Upsert:
        return upsert_progress(self._models, by_values=self.by_values)

    def _warn_of_no_middleware(self, task_id: str) -> None:
        self.awaits_middleware = False
        logger.warning(
            'task %s: track="started" needs TaskMetadataMiddleware, but its result was stored '
            "before a middleware was active in this process. If the broker has none, call "
            "broker.add_middlewares(TaskMetadataMiddleware())",
            task_id,
        )

    async def _store_results(self, batch: Mapping[Any, Entry[ResultRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        stored = await self._database.fetch_all(self._upsert_results.of(rows), self._purpose)
        if len(stored) < len(batch):
            self._log_superseded(batch, stored)
        self._announce(self._models.config.results_channel, batch)
        return {}

    def _log_superseded(self, batch: Iterable[Any], stored: Sequence[Any]) -> None:
        others = [str(task_id) for task_id in set(batch).difference(row[0] for row in stored)]
        logger.warning(
            "%d results were not stored in table %s, because it has results of a later attempt or "
            "message: %s",
            *(len(others), self._models.config.qualified_name),
            ", ".join(others[:_MAX_SHOWN] + ["..."] * (len(others) > _MAX_SHOWN)),
        )

    async def _store_progress(self, batch: Mapping[Any, Entry[ProgressRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        config = self._models.config
        purpose = f"store its progress in table {config.qualified(config.progress_table_name)}"
        _ = await self._database.fetch_all(self._upsert_progress.of(rows), purpose)
        self._announce(config.progress_channel, batch)
        return {}

    def _extra_of(self, task_id: str, result: TaskiqResult[Any]) -> Mapping[str, Any]:
        return {} if self._extra_values is None else self._extra_values.of(task_id, result)

    def _encode_extended(self, column_id: Any, item: _Extended) -> ExtendedRow:
        result, extra = item
        return {**self._codec.encode_result(column_id, result)._asdict(), **extra}

    async def _store_extended(self, batch: Mapping[Any, Entry[ExtendedRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        try:
            stored = await self._upsert_rows(rows)
        except StorageError as exc:
            if blames_a_row(exc) and len(rows) > 1:
                raise  # the batcher retries it in halves
            stored = await self._upsert_without_extra(rows, exc)
        if len(stored) < len(batch):
            self._log_superseded(batch, stored)
        self._announce(self._models.config.results_channel, batch)
        return {}

    async def _upsert_rows(self, rows: Sequence[ExtendedRow]) -> Sequence[Any]:
        try:
            # All or none: a result that is retried may have been read and deleted meanwhile.
            return await self._database.fetch_all(self._upsert_extended.of(rows), self._purpose)
        except TaskiqSaPgError:
            raise
        except CONVERSION_ERRORS as exc:
            text, _ = describe(exc, self._purpose)
            raise StorageError(text, None) from exc

    async def _upsert_without_extra(
        self, rows: Sequence[ExtendedRow], refusal: StorageError
    ) -> Sequence[Any]:
        """Stores results without their extra values, if those may be the reason of the error."""
        bare = [self._upsert_extended.without_extra(row) for row in rows]
        extended = [row["task_id"] for row, alone in zip(rows, bare, strict=True) if row != alone]
        cause = refusal.__cause__
        if not extended or (isinstance(cause, Exception) and is_transient(cause)):
            raise refusal
        stored = await self._upsert_rows(bare)
        for task_id in extended:
            logger.error("task %s: its result is stored without extra_values: %s", task_id, refusal)
        return stored

    def _announce(self, channel: str, batch: Mapping[Any, Any]) -> None:
        if self._notifier is not None:
            self._notifier.announce(channel, batch)


def _rank_of(result: TaskiqResult[Any]) -> tuple[float, int]:
    """Orders several results of a task: by message, then by attempt."""
    if not isinstance(result, TaskiqResult):
        return 0.0, 0  # rejected later, when it is encoded
    queued_at = task_metadata_of(result).queued_at
    return 0.0 if queued_at is None else queued_at.timestamp(), attempt_of(result.labels)


def _size_of(row: ResultRow) -> int:
    rest = (row.error, row.traceback, row.log, row.args, row.kwargs)
    return len(row.return_value) + len(row.labels) + sum(map(len, filter(None, rest)))
