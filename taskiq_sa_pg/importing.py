"""Results and progress of taskiq-postgres, into the tables of a backend.

    report = await import_results(backend, "old_results", serializer=PickleSerializer())

Nothing is changed in the old table, and nothing is overwritten in ours, so an import may be
interrupted at any moment, run again, and run while workers store results in both tables.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, NoReturn, TypeVar
from uuid import UUID

import taskiq.exceptions
from sqlalchemy import Select, Table
from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import PickleSerializer

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.batching import MAX_BYTES, Batcher, Entry, blames_a_row
from taskiq_sa_pg.codec import reason_of
from taskiq_sa_pg.exceptions import ConfigurationError, InvalidTaskIdError
from taskiq_sa_pg.import_source import OldTable, find_old_table
from taskiq_sa_pg.import_statements import OldRow
from taskiq_sa_pg.jsonb import storable_text
from taskiq_sa_pg.rows import ProgressRow, ResultRow
from taskiq_sa_pg.statements import select_having_progress, select_ready
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.upserts import Upsert, insert_progress, insert_results

_Row = TypeVar("_Row", ResultRow, ProgressRow)

# Without [Any]: older pydantic would refuse the objects that other packages have pickled.
_RESULT: Final[type[TaskiqResult[Any]]] = TaskiqResult
_PROGRESS: Final[type[TaskProgress[Any]]] = TaskProgress


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A result or a progress that was left out.

    Attributes:
        task_id: The task.
        reason: What cannot be read or stored, and why: one line.
    """

    task_id: str
    reason: str


@dataclass(slots=True)
class ImportReport:
    """What became of the old rows, each of which has a result, progress or both.

    Attributes:
        rows: How many were read.
        results: Results stored; with dry_run, those that would be.
        progress: Progress stored, likewise.
        already_there: Results and progress that our tables had.
        unreadable: How often something was left out, because it could not be read or stored.
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
    """Stores what a table of taskiq-postgres holds and ours do not.

    The old rows are read in the order of their task ids, and one batch after the other is
    committed. Where ours have a result or progress of a task already, it stays. What comes into
    the old table behind the batch that is being read is left for the next run.

    Old tables do not tell when a task finished: `finished_at` is the time of the import. Nobody is
    notified; whoever waits for a result finds it within 3 seconds. Of UUIDs that go into a text
    column the task id becomes the 32 digits that taskiq makes its ids of.

    Args:
        backend: Started; its tables, serializer and connections are used.
        from_table: The old table, to the letter: its columns are task_id (VARCHAR, TEXT or UUID),
            result and, but for very old ones, progress (BYTEA).
        from_engine: Where the old table is. It is borrowed. None is the backend's database.
        from_schema: PostgreSQL schema of the old table; None leaves it to the search_path.
        serializer: Of the old rows; None is PickleSerializer, which runs code that whoever wrote
            the rows has chosen.
        batch_size: The most rows that are read at once; large ones come in smaller batches.
        dry_run: True reads everything and stores nothing.
        on_batch: Called after each batch has been committed, with the counts until then: always
            the same object.
        on_unreadable: Called for all that is left out.

    Returns:
        The counts.

    Raises:
        NotStartedError: The backend is not started.
        ConfigurationError: A batch_size below 1, or an engine that is not one for PostgreSQL.
        SchemaError: There is no such table, or it is not one of taskiq-postgres.
        StorageError: PostgreSQL refused a statement or could not be reached; what was committed
            stays, and the next run goes on from there.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be 1 or more, not {batch_size}")
    target = _Target(backend, serializer or PickleSerializer(), dry_run, on_unreadable)
    try:
        async with _old_table(backend, from_engine, from_table, from_schema) as table:
            async for rows in table.read(batch_size, MAX_BYTES):
                await target.add(rows)
                if on_batch is not None:
                    on_batch(target.report)
    finally:
        await target.close()
    return target.report


async def count_rows(
    backend: SQLAlchemyResultBackend[Any],
    from_table: str,
    *,
    from_engine: AsyncEngine | None = None,
    from_schema: str | None = None,
) -> int:
    """How many rows import_results() would read now, for a progress bar's total.

    Arguments as import_results().

    Raises:
        NotStartedError: The backend is not started.
        ConfigurationError: An engine that is not one for PostgreSQL.
        SchemaError: There is no such table, or it is not one of taskiq-postgres.
        StorageError: PostgreSQL could not be asked.
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
    _ = backend._started
    if engine is None:
        yield await find_old_table(backend._store, table_name, schema)
        return
    store = Store(engine=engine, max_connections=1)
    await store.open()
    try:
        # Not tried again: nobody has been there yet, and a wrong address is told at once.
        yield await find_old_table(store, table_name, schema, retry_timeout=0)
    finally:
        await store.close()


class _Target:
    """Our tables: turns old rows into rows of theirs, stores those and counts."""

    def __init__(
        self,
        backend: SQLAlchemyResultBackend[Any],
        serializer: TaskiqSerializer,
        dry_run: bool,
        on_unreadable: Callable[[Unreadable], None] | None,
    ) -> None:
        self.report = ImportReport()
        self._config = backend.models.config
        self._codec = backend._settings.codec
        self._serializer = serializer
        self._dry_run = dry_run
        self._on_unreadable = on_unreadable
        store, models = backend._store, backend.models
        self._results: _Part[ResultRow] = _Part(
            "result",
            self._encode_result,
            store=store,
            insert=insert_results(models, features=backend._started.layout.features),
            select_present=select_ready(models),
            table=models.results_table,
        )
        self._progress: _Part[ProgressRow] = _Part(
            "progress",
            self._encode_progress,
            store=store,
            insert=insert_progress(models),
            select_present=select_having_progress(models),
            table=models.progress_table,
        )

    async def add(self, rows: Iterable[OldRow]) -> None:
        """Stores what a batch holds and our tables do not."""
        results: dict[Any, tuple[str, bytes]] = {}
        progress: dict[Any, tuple[str, bytes]] = {}
        for row in rows:
            self.report.rows += 1
            task_id = row.task_id.hex if isinstance(row.task_id, UUID) else row.task_id
            try:
                column_id = self._config.to_column_task_id(task_id)
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

    async def close(self) -> None:
        """Returns when nothing is under way any more."""
        await asyncio.gather(self._results.close(), self._progress.close())

    async def _add(self, part: "_Part[_Row]", values: Mapping[Any, tuple[str, bytes]]) -> int:
        if not values:
            return 0
        present = await part.find_present(values)
        self.report.already_there += len(present)
        rows: dict[str, _Row] = {}
        for column_id, (task_id, dumped) in values.items():
            if column_id not in present:
                try:
                    rows[task_id] = part.encode(column_id, dumped)
                except Exception as exc:  # noqa: BLE001 - unpickling raises what it likes
                    self._leave_out(task_id, f"{part.name}: {reason_of(exc)}")
        if self._dry_run:
            return len(rows)
        outcomes = await part.store_all(rows.values())
        for task_id, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                if not blames_a_row(outcome):
                    raise outcome
                self._leave_out(task_id, f"{part.name}: {outcome}")
            elif not outcome:  # a worker was faster
                self.report.already_there += 1
        return outcomes.count(True)

    def _leave_out(self, task_id: str, reason: str) -> None:
        self.report.unreadable += 1
        if self._on_unreadable is not None:
            self._on_unreadable(Unreadable(task_id, storable_text(" ".join(reason.split()))))

    def _encode_result(self, column_id: Any, dumped: bytes) -> ResultRow:
        document = self._serializer.loadb(dumped)
        result = _RESULT.model_validate(document)
        if result.error is not None and isinstance(document, dict):
            _name_stand_ins(result.error, document.get("error"))
        return self._codec.encode_result(column_id, result, strict=True)

    def _encode_progress(self, column_id: Any, dumped: bytes) -> ProgressRow:
        progress = _PROGRESS.model_validate(self._serializer.loadb(dumped))
        return self._codec.encode_progress(column_id, progress)


class _Part(Generic[_Row]):
    """One of our tables: stores rows of tasks that it has none of."""

    def __init__(
        self,
        name: str,
        encode: Callable[[Any, bytes], _Row],
        *,
        store: Store,
        insert: Upsert,
        select_present: Select[Any],
        table: Table,
    ) -> None:
        self.name = name
        self.encode: Callable[[Any, bytes], _Row] = encode
        self._store = store
        self._insert = insert
        self._select_present = select_present
        self._table = table.fullname
        self._batcher: Batcher[Any, _Row, _Row, bool] = Batcher(
            self._flush, encode=_unchanged, size=_size_of
        )

    async def find_present(self, column_ids: Iterable[Any]) -> set[Any]:
        """Those of the tasks that the table has."""
        rows = await self._store.fetch(
            self._select_present,
            {"task_ids": list(column_ids)},
            f"look at what table {self._table} has",
        )
        return {column_id for (column_id,) in rows}

    async def store_all(self, rows: Iterable[_Row]) -> list[bool | BaseException | None]:
        """For each row: True if it was stored, None if one was there, or what went wrong."""
        calls = [self._batcher.submit(row.task_id, row) for row in rows]
        return await asyncio.gather(*calls, return_exceptions=True)

    async def close(self) -> None:
        """Returns when nothing is under way any more."""
        await self._batcher.close()

    async def _flush(self, batch: Mapping[Any, Entry[_Row]]) -> dict[Any, bool]:
        purpose = f"import into table {self._table}"
        stored = [
            column_id
            for statement, parameters in self._insert.of([entry.row for entry in batch.values()])
            for (column_id,) in await self._store.fetch(statement, parameters, purpose)
        ]
        return dict.fromkeys(stored, True)


def _unchanged(_: object, row: _Row) -> _Row:
    return row


def _size_of(row: ResultRow | ProgressRow) -> int:
    return sum(len(value) for value in row if isinstance(value, bytes | str))


def _name_stand_ins(exception: BaseException, document: Any) -> None:
    """Gives the exceptions of classes that are not imported here the name of their module.

    taskiq puts its stand-ins into a module of its own; with the name of theirs, a reader that has
    the class gets it.
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
        # Pickle would import the module to look whether the class is in it.
        cls.__reduce_ex__ = _refuse_pickle  # type: ignore[assignment]  # of a stand-in of our own
    for chained, name in (
        (exception.__cause__, "exc_cause"),
        (exception.__context__, "exc_context"),
    ):
        if chained is not None:
            _name_stand_ins(chained, document.get(name))


def _refuse_pickle(exception: BaseException, _protocol: int) -> NoReturn:
    raise TypeError(f"the class of {type(exception).__qualname__} is not imported here")
