"""Copies results and progress of old tables that ours do not have, one batch after the other."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from uuid import UUID

import taskiq.exceptions
from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from taskiq import TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import PickleSerializer

from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.batching import MAX_BYTES, blames_a_row
from taskiq_sa_pg.codec import reason_of, storable_text
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import (
    InvalidTaskIdError,
    StorageError,
    TaskiqSaPgError,
    check_flag,
    check_serializer,
    check_whole,
)
from taskiq_sa_pg.importing.source import OldRow, OldTable, find_old_table

# Without [Any]: older pydantic would reject the objects that other packages have pickled.
_RESULT: Final[type[TaskiqResult[Any]]] = TaskiqResult
_PROGRESS: Final[type[TaskProgress[Any]]] = TaskProgress


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A result or a progress that was skipped.

    Attributes:
        task_id: The task.
        reason: What cannot be read or stored, and why: one line.
        undecodable: If it cannot be decoded, "result" or "progress" and the name of the
            exception's class, which many rows share where `reason` differs. None for other reasons.
    """

    task_id: str
    reason: str
    undecodable: tuple[str, str] | None = None


@dataclass(slots=True)
class ImportReport:
    """Counts of an import. Each old row has a result, progress, or both.

    Attributes:
        rows: Rows read.
        results: Results stored; with dry_run, results that would be stored.
        progress: Progress stored, counted in the same way.
        already_there: Results and progress that the new tables already had.
        unreadable: Results and progress skipped, because they could not be read or stored.
    """

    rows: int = 0
    results: int = 0
    progress: int = 0
    already_there: int = 0
    unreadable: int = 0


async def import_results(
    backend: SQLAlchemyResultBackend[Any],
    from_table: str,
    *,
    from_engine: AsyncEngine | None = None,
    from_schema: str | None = None,
    serializer: TaskiqSerializer | None = None,
    batch_size: int = 1000,
    dry_run: bool = False,
    on_batch: Callable[[ImportReport], None] | None = None,
    on_unreadable: Callable[[Unreadable], None] | None = None,
) -> ImportReport:
    """Copies results and progress of a taskiq-postgres table that the backend does not have.

    Old rows are read in the order of their task ids, and committed in batches. Existing results
    and progress in the new tables are never overwritten. Rows that are added to the old table
    behind the current batch are left for the next run.

    Old tables do not store when a task finished: `finished_at` is the time of the import. No
    notifications are sent; waiting clients find a result within 3 seconds. A UUID is stored in a
    text column as 32 hex digits, the format of taskiq's ids.

    Args:
        backend: The backend, started; its tables, serializer and connections are used.
        from_table: Name of the old table, case-sensitive. Its columns are task_id (VARCHAR, TEXT
            or UUID), result and, except in very old tables, progress (BYTEA).
        from_engine: Engine for the database of the old table; it is borrowed. None uses the
            backend's database.
        from_schema: PostgreSQL schema of the old table. None uses the search_path.
        serializer: Serializer of the old rows. None is PickleSerializer, which can execute code
            that the rows contain.
        batch_size: Maximum number of rows that are read at once; fewer if the rows are large.
        dry_run: True reads everything and stores nothing.
        on_batch: Called after each committed batch with the counts so far, always the same object.
        on_unreadable: Called for everything that is skipped.

    Returns:
        The counts.

    Raises:
        NotStartedError: The backend is not started.
        ConfigurationError: An argument is invalid, or the engine is not for PostgreSQL.
        SchemaError: The table does not exist, or is not a table of taskiq-postgres.
        StorageError: PostgreSQL rejected a statement or is unreachable. Committed batches are kept,
            and the next run skips them.
    """
    serializer = PickleSerializer() if serializer is None else serializer
    check_serializer(serializer)
    check_whole("batch_size", batch_size)
    check_flag("dry_run", dry_run)
    target = _Target(backend, serializer, dry_run, on_unreadable)
    async with _old_table(backend, from_engine, from_table, from_schema) as table:
        async for rows in table.read(batch_size, MAX_BYTES):
            await target.add(rows)
            if on_batch is not None:
                on_batch(target.report)
    return target.report


async def count_rows(
    backend: SQLAlchemyResultBackend[Any],
    from_table: str,
    *,
    from_engine: AsyncEngine | None = None,
    from_schema: str | None = None,
) -> int:
    """Counts the rows that import_results() would read now, for the total of a progress bar.

    The arguments are those of import_results().

    Raises:
        NotStartedError: The backend is not started.
        ConfigurationError: The engine is not for PostgreSQL.
        SchemaError: The table does not exist, or is not a table of taskiq-postgres.
        StorageError: PostgreSQL rejected the query or is unreachable.
    """
    async with _old_table(backend, from_engine, from_table, from_schema) as table:
        return await table.count_rows()


@asynccontextmanager
async def _old_table(
    backend: SQLAlchemyResultBackend[Any],
    engine: AsyncEngine | None,
    table_name: str,
    schema: str | None,
) -> AsyncIterator[OldTable]:
    runtime = backend.runtime
    if engine is None:
        yield await find_old_table(runtime.database, table_name, schema)
        return
    database = Database(engine=engine, max_connections=1)
    await database.open()
    try:
        # Not retried: it is the first connection, and a wrong address is reported at once.
        yield await find_old_table(database, table_name, schema, retry_timeout=0)
    finally:
        await database.close()


@dataclass(frozen=True, slots=True)
class _Part:
    """One of our tables, and how a part of an old row is stored in it."""

    name: str
    encode: Callable[[Any, bytes], sql.ResultRow | sql.ProgressRow]
    insert: sql.Upsert
    select_present: Select[Any]


class _Target:
    """Our tables: converts old rows, stores and counts them."""

    def __init__(
        self,
        backend: SQLAlchemyResultBackend[Any],
        serializer: TaskiqSerializer,
        dry_run: bool,
        on_unreadable: Callable[[Unreadable], None] | None,
    ) -> None:
        self.report = ImportReport()
        self._runtime = backend.runtime
        self._purpose = f"import into table {backend.models.config.qualified_name}"
        self._serializer = serializer
        self._dry_run = dry_run
        self._on_unreadable = on_unreadable
        results, progress = sql.insert_results(backend.models), sql.insert_progress(backend.models)
        ready, having = sql.select_ready(backend.models), sql.select_having_progress(backend.models)
        self._results = _Part("result", self._encode_result, results, ready)
        self._progress = _Part("progress", self._encode_progress, progress, having)

    async def add(self, rows: Iterable[OldRow]) -> None:
        """Stores the results and progress of a batch that our tables do not have."""
        config = self._runtime.settings.models.config
        results: dict[Any, tuple[str, bytes]] = {}
        progress: dict[Any, tuple[str, bytes]] = {}
        for row in rows:
            self.report.rows += 1
            task_id = row.task_id.hex if isinstance(row.task_id, UUID) else row.task_id
            try:
                column_id = config.to_column_task_id(task_id)
            except InvalidTaskIdError as exc:
                self._leave_out(task_id, str(exc))
                continue
            for values, dumped in ((results, row.result), (progress, row.progress)):
                if dumped is None:
                    continue
                if column_id in values:  # a UUID in another spelling
                    self.report.already_there += 1
                else:
                    values[column_id] = task_id, dumped
        self.report.results += await self._add(self._results, results)
        self.report.progress += await self._add(self._progress, progress)

    async def _add(self, part: _Part, values: Mapping[Any, tuple[str, bytes]]) -> int:
        """Returns the number of stored rows."""
        if not values:
            return 0
        task_ids = {"task_ids": list(values)}
        found = await self._runtime.database.fetch(part.select_present, task_ids, self._purpose)
        present = {column_id for (column_id,) in found}
        self.report.already_there += len(present)
        rows: list[sql.ResultRow | sql.ProgressRow] = []
        for column_id, (task_id, dumped) in values.items():
            if column_id not in present:
                try:
                    rows.append(part.encode(column_id, dumped))
                except Exception as exc:  # noqa: BLE001 - unpickling raises what it likes
                    # Ours are raised when the value is encoded again.
                    is_ours = isinstance(exc, TaskiqSaPgError)
                    kind = None if is_ours else (part.name, type(exc).__qualname__)
                    self._leave_out(task_id, f"{part.name}: {reason_of(exc)}", kind)
        if self._dry_run or not rows:
            return len(rows)
        return await self._insert(part, rows, values)

    async def _insert(
        self,
        part: _Part,
        rows: Sequence[sql.ResultRow | sql.ProgressRow],
        values: Mapping[Any, tuple[str, bytes]],
    ) -> int:
        async def insert(connection: AsyncConnection) -> int:
            return sum([len((await connection.execute(*call)).all()) for call in calls])

        calls = part.insert.of(rows)
        try:
            stored = await self._runtime.database.transact(insert, self._purpose)
        except StorageError as exc:
            if not blames_a_row(exc):
                raise
            if len(rows) == 1:
                task_id, _ = values[rows[0].task_id]
                self._leave_out(task_id, f"{part.name}: {exc}")
                return 0
            halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            return sum([await self._insert(part, half, values) for half in halves])
        self.report.already_there += len(rows) - stored  # a worker was faster
        return stored

    def _leave_out(
        self, task_id: str, reason: str, undecodable: tuple[str, str] | None = None
    ) -> None:
        self.report.unreadable += 1
        if self._on_unreadable is not None:
            text = storable_text(" ".join(reason.split()))
            self._on_unreadable(Unreadable(task_id, text, undecodable))

    def _encode_result(self, column_id: Any, dumped: bytes) -> sql.ResultRow:
        document = self._serializer.loadb(dumped)
        result = _RESULT.model_validate(document)
        if result.error is not None and isinstance(document, dict):
            _name_stand_ins(result.error, document.get("error"))
        return self._runtime.settings.codec.encode_result(column_id, result, strict=True)

    def _encode_progress(self, column_id: Any, dumped: bytes) -> sql.ProgressRow:
        progress = _PROGRESS.model_validate(self._serializer.loadb(dumped))
        return self._runtime.settings.codec.encode_progress(column_id, progress)


def _name_stand_ins(exception: BaseException, document: Any) -> None:
    """Sets the original module name on exceptions whose classes are not imported here.

    taskiq's stand-in classes have taskiq's own module name. With the original name, a reader that
    has the class rebuilds it.
    """
    if not isinstance(document, dict):
        return
    cls, module = type(exception), document.get("exc_module")
    is_stand_in = (
        cls.__module__ == taskiq.exceptions.__name__
        and getattr(taskiq.exceptions, cls.__name__, None) is not cls
    )
    if is_stand_in and isinstance(module, str):
        cls.__module__ = module
        # Pickle would import the module to check whether it has the class.
        cls.__reduce_ex__ = _refuse_pickle  # type: ignore[assignment]  # a stand-in class
    chain = (exception.__cause__, "exc_cause"), (exception.__context__, "exc_context")
    for chained, name in chain:
        if chained is not None:
            _name_stand_ins(chained, document.get(name))


def _refuse_pickle(exception: BaseException, _protocol: int) -> NoReturn:
    raise TypeError(f"the class of {type(exception).__qualname__} is not imported here")
