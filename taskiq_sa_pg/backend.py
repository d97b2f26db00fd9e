"""SQLAlchemyResultBackend: taskiq's contract, kept thin. It encodes, stores and decodes."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final, Literal, TypeVar, get_args

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import AsyncResultBackend, TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.config import DEFAULT_TABLE_NAME, PayloadField, TableConfig, TaskIdField
from taskiq_sa_pg.engines import DsnSource
from taskiq_sa_pg.exceptions import ConfigurationError, ResultIsMissingError, SchemaError
from taskiq_sa_pg.models import Models, build_models
from taskiq_sa_pg.schema import check
from taskiq_sa_pg.statements import (
    MAX_IDS_PER_READ,
    StoredProgress,
    StoredResult,
    as_arrays,
    build_statements,
)
from taskiq_sa_pg.store import Store

logger = logging.getLogger(__name__)

_ReturnType = TypeVar("_ReturnType")

SchemaCheck = Literal["error", "warn", "off"]


class SQLAlchemyResultBackend(AsyncResultBackend[_ReturnType]):
    """Keeps task results and task progress in two tables of your PostgreSQL.

    Nothing connects before startup(), which the broker calls. Every write is committed when its
    call returns.

    Args:
        dsn: Address of the database: `postgresql://...` (asyncpg), `postgresql+psycopg://...`,
            several hosts in libpq's form, a sqlalchemy.URL, or a callable without arguments
            that returns one and is asked again for every new connection. The engine made from
            it belongs to the backend.
        keep_results: False deletes a result, with its progress, in the transaction that reads
            it: of many readers exactly one gets it.
        table_name: The results table; the progress table is `<table_name>_progress`.
        field_for_task_id: Type of the task-id columns. "Uuid" takes UUIDs only.
        serializer: Turns values into bytes; None is PickleSerializer, and JSONSerializer with
            "Jsonb".
        engine: Your AsyncEngine, instead of dsn. It is borrowed: never disposed, and its other
            users never notice.
        models: Models of the tables, from build_models() or of your own; None builds them from
            the names and types given here.
        schema: PostgreSQL schema of the tables; None leaves it to the search_path.
        field_for_payload: Type of return_value, error and meta. "Jsonb" can be read and
            filtered in SQL, and needs a serializer that writes JSON.
        check_schema: What startup() does about tables that are absent or unfit: "error" raises
            SchemaError, "warn" logs it, "off" does not look.
        run_migrations: True makes or upgrades the tables at startup(), under a lock; the role
            then needs the right to create them.
        **engine_kwargs: With dsn: passed on to create_async_engine(). Where no pool is chosen,
            pool_size is 5 and max_overflow 0.

    Raises:
        ConfigurationError: An argument that cannot work, or two that contradict each other.
    """

    def __init__(
        self,
        dsn: DsnSource | None = None,
        keep_results: bool = True,
        table_name: str = DEFAULT_TABLE_NAME,
        field_for_task_id: TaskIdField = "VarChar",
        serializer: TaskiqSerializer | None = None,
        *,
        engine: AsyncEngine | None = None,
        models: Models | None = None,
        schema: str | None = None,
        field_for_payload: PayloadField = "Bytea",
        check_schema: SchemaCheck = "error",
        run_migrations: bool = False,
        **engine_kwargs: Any,
    ) -> None:
        super().__init__()
        config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
        self.models: Final = _choose_models(models, config)
        if check_schema not in get_args(SchemaCheck):
            raise ConfigurationError(
                f'check_schema must be "error", "warn" or "off", not {check_schema!r}'
            )
        self.keep_results: Final = keep_results
        self._config: Final = self.models.config
        self._table: Final = self._config.qualified_name
        self._check_schema: Final = check_schema
        self._run_migrations: Final = run_migrations
        self._codec: Final = Codec(self._config, serializer)
        self._statements: Final = build_statements(self.models)
        self._store: Final = Store(dsn, engine=engine, engine_kwargs=engine_kwargs)

    async def startup(self) -> None:
        """Makes the engine and looks at the tables; may be repeated, on another event loop too.

        Raises:
            SchemaError: The tables are absent or unfit; names the differences and the remedy.
            StorageError: PostgreSQL could not be reached.
            ConfigurationError: The engine cannot be made.
        """
        was_opened = await self._store.open()
        try:
            if self._run_migrations:
                # Here, because Alembic is slow to import and only this needs it.
                from taskiq_sa_pg.provisioning import provision  # noqa: PLC0415

                await provision(self._store, self._config)
            await self._look_at_schema()
        except BaseException:
            if was_opened:
                await self._store.close()
            raise
        await super().startup()

    async def shutdown(self) -> None:
        """Disposes the backend's own engine; a given one is left alone. May be repeated."""
        await self._store.close()
        await super().shutdown()

    async def set_result(self, task_id: str, result: TaskiqResult[_ReturnType]) -> None:
        """Stores a result, over an earlier one unless that is of a later attempt.

        A value that cannot be serialized is stored as an error result, so that whoever waits
        for it gets an answer.

        Raises:
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL refused the row or could not be reached.
        """
        row = self._codec.encode_result(task_id, result)
        await self._store.fetch(
            self._statements.upsert_results,
            as_arrays([row]),
            f"store the result of task {task_id!r} in table {self._table}",
        )

    async def is_result_ready(self, task_id: str) -> bool:
        """Whether there is a result; progress alone makes none.

        Raises:
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        rows = await self._store.fetch(
            self._statements.select_ready,
            {"task_ids": [self._config.to_column_task_id(task_id)]},
            f"look for the result of task {task_id!r} in table {self._table}",
        )
        return bool(rows)

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[_ReturnType]:
        """The result; with keep_results=False it is deleted as it is read.

        Args:
            task_id: The task.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            ResultIsMissingError: There is no result (any more).
            ResultDecodeError: The result cannot be read back; it stays in the table.
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        results = await self.get_results([task_id], with_logs=with_logs)
        if not results:
            raise ResultIsMissingError(task_id, self._table)
        return results[task_id]

    async def get_results(
        self, task_ids: Iterable[str], with_logs: bool = False
    ) -> dict[str, TaskiqResult[_ReturnType]]:
        """The results that are ready, by task id; in one statement for every 200 ids.

        With keep_results=False they are deleted as they are read, in one transaction: all or,
        if one of them cannot be read back, none.

        Args:
            task_ids: Any number of tasks.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            ResultDecodeError: A result cannot be read back; it stays in the table.
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold one of the ids.
            StorageError: PostgreSQL could not be asked.
            TypeError: task_ids is one str, whose letters would be taken for ids.
        """
        if isinstance(task_ids, str):
            raise TypeError(f"get_results() takes several ids, not one str: {task_ids!r}")
        # A UUID has several spellings: those of one task get the same result.
        column_ids = {task_id: self._config.to_column_task_id(task_id) for task_id in task_ids}
        if not column_ids:
            return {}
        names = {column_id: task_id for task_id, column_id in column_ids.items()}
        read = self._read if self.keep_results else self._take
        results = await read(names, with_logs)
        return {
            task_id: results[column_id]
            for task_id, column_id in column_ids.items()
            if column_id in results
        }

    async def set_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        """Stores progress, replacing what was there.

        Raises:
            ResultSerializationError: The serializer cannot hold the metadata.
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL refused the row or could not be reached.
        """
        row = self._codec.encode_progress(task_id, progress)
        await self._store.fetch(
            self._statements.upsert_progress,
            as_arrays([row]),
            f"store the progress of task {task_id!r} in table {self._table}_progress",
        )

    async def get_progress(self, task_id: str) -> TaskProgress[Any] | None:
        """The last progress, which outlives the result; None if there never was one.

        Raises:
            ResultDecodeError: The metadata cannot be read back.
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        rows = await self._store.fetch(
            self._statements.select_progress,
            {"task_ids": [self._config.to_column_task_id(task_id)]},
            f"read the progress of task {task_id!r} in table {self._table}_progress",
        )
        if not rows:
            return None
        return self._codec.decode_progress(task_id, StoredProgress._make(rows[0]))

    async def _look_at_schema(self) -> None:
        if self._check_schema == "off":
            return
        try:
            await check(self._store, self.models)
        except SchemaError as exc:
            if self._check_schema == "error":
                raise
            logger.warning("%s", exc)

    async def _read(
        self, names: dict[Any, str], with_logs: bool
    ) -> dict[Any, TaskiqResult[_ReturnType]]:
        results: dict[Any, TaskiqResult[_ReturnType]] = {}
        for asked in _batches(names):
            rows = await self._store.fetch(
                self._statements.select_results,
                {"task_ids": asked},
                f"read {_results_of(names)} in table {self._table}",
            )
            results.update(self._decode(rows, names, with_logs))
        return results

    async def _take(
        self, names: dict[Any, str], with_logs: bool
    ) -> dict[Any, TaskiqResult[_ReturnType]]:
        results: dict[Any, TaskiqResult[_ReturnType]] = {}
        purpose = f"take {_results_of(names)} from table {self._table}"
        async with self._store.transaction(purpose) as connection:
            for asked in _batches(names):
                taken = await connection.execute(self._statements.take_results, {"task_ids": asked})
                # Before the commit: what cannot be decoded is not deleted.
                results.update(self._decode(taken.all(), names, with_logs))
        return results

    def _decode(
        self, rows: Sequence[Row[Any]], names: dict[Any, str], with_logs: bool
    ) -> dict[Any, TaskiqResult[_ReturnType]]:
        return {
            row.task_id: self._codec.decode_result(names[row.task_id], row, with_logs=with_logs)
            for row in map(StoredResult._make, rows)
        }


def _choose_models(models: Models | None, config: TableConfig) -> Models:
    if models is None:
        return build_models(**asdict(config))
    if not isinstance(models, Models):
        raise ConfigurationError(f"models must be a Models, not {type(models).__qualname__}")
    if config not in {models.config, TableConfig()}:
        raise ConfigurationError(
            f"models were made for {models.config}, and the other arguments say {config}: give "
            "names and types to the models alone"
        )
    return models


def _batches(names: dict[Any, str]) -> Iterator[list[Any]]:
    column_ids = list(names)
    for start in range(0, len(column_ids), MAX_IDS_PER_READ):
        yield column_ids[start : start + MAX_IDS_PER_READ]


def _results_of(names: dict[Any, str]) -> str:
    first = next(iter(names.values()))
    if len(names) == 1:
        return f"the result of task {first!r}"
    return f"the results of {len(names)} tasks, {first!r} first,"
