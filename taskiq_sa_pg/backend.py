"""SQLAlchemyResultBackend: taskiq's contract, kept thin. It encodes, stores and decodes."""

import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import asdict
from typing import Any, Final, Literal, TypeVar, get_args, overload

from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import AsyncResultBackend, AsyncTaskiqTask, TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.asking import DEFAULT_BATCH_SIZE, OrderBy, Where, find_results
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.config import DEFAULT_TABLE_NAME, PayloadField, TableConfig, TaskIdField
from taskiq_sa_pg.decoding import RowDecoder
from taskiq_sa_pg.engines import DsnSource
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    NotStartedError,
    ResultIsMissingError,
    SchemaError,
)
from taskiq_sa_pg.extras import ExtraValues, ExtraValuesFunction
from taskiq_sa_pg.metadata import NO_METADATA, metadata_of
from taskiq_sa_pg.models import Models, build_models
from taskiq_sa_pg.parts import Parts, Settings
from taskiq_sa_pg.pruning import Pruned, check_limits
from taskiq_sa_pg.results import Task
from taskiq_sa_pg.retention import Retention, Seconds, check_seconds
from taskiq_sa_pg.schema import check
from taskiq_sa_pg.store import (
    DEFAULT_COMMAND_TIMEOUT,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_RETRY_TIMEOUT,
    Store,
)
from taskiq_sa_pg.telemetry import ListenerState, Stats, Telemetry
from taskiq_sa_pg.tracking import TaskStatus, Track, check_status

logger = logging.getLogger(__name__)

_ReturnType = TypeVar("_ReturnType")
_T = TypeVar("_T")

SchemaCheck = Literal["error", "warn", "off"]


class SQLAlchemyResultBackend(AsyncResultBackend[_ReturnType]):
    """Keeps task results and task progress in tables of your PostgreSQL.

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
        extra_values: Called with the task id and the TaskiqResult that set_result() is about to
            store; returns a dict of values for columns of your own in models.Result, by attribute,
            which are stored in the same row and statement. None is NULL; a column without a key
            is left alone, and gets its default in a new row. What cannot be used, be it that the
            function raises or that PostgreSQL refuses a value, is logged as an error, and the
            result is stored without it. It must not be async, and should be quick.
        schema: PostgreSQL schema of the tables; None leaves it to the search_path.
        field_for_payload: Type of return_value, error and meta. "Jsonb" can be read and
            filtered in SQL, and needs a serializer that writes JSON.
        check_schema: What startup() does about tables that are absent or unfit: "error" raises
            SchemaError, "warn" logs it, "off" does not look, and takes them to be those of this
            release.
        run_migrations: True makes or upgrades the tables at startup(), under a lock; the role
            then needs the right to create them.
        notify: Whether to tell waiting processes of what was stored, and to listen for it. False
            sends no notifications, and waiting looks ten times a second.
        listen_dsn: Address for the listening connection, where the other leads through a
            transaction pooler. None takes the other.
        result_ttl: For how many seconds after its completion, by the database's clock, a success
            is kept, or a timedelta. Then it is missing, for every read, and prune() deletes it.
            The label `result_ttl` of a task, seconds or None, goes before it. None keeps results
            for ever.
        failure_ttl: The same of failures, with the label `failure_ttl`.
        progress_ttl: For how many seconds after their last change prune() leaves progress and
            status there of a task that has no result, or a timedelta; None for ever.
        prune_interval: Seconds, or a timedelta, between runs of prune() in the background of
            every process that stores results, of which one at a time works. None runs none.
        track: "started" keeps what tasks are at before their results in a third table, for
            get_status() and get_running(). The broker needs TaskMetadataMiddleware, which writes
            it before a task is sent and before it is started. None writes nothing.
        max_payload_bytes: The most bytes of a serialized return value, exception or progress's
            metadata. A larger result is stored as an error result, so that whoever waits gets an
            answer; None sets no limit.
        max_connections: The most connections that are in use at once, the listening one aside.
        retry_timeout: For how many seconds a statement is tried again after a fault that passes:
            a lost connection, a restart, a failover, a deadlock. 0 tries once.
        command_timeout: How many seconds one attempt may take; a server that is silent for so
            long counts as lost.
        startup_timeout: For how many seconds startup() waits for a PostgreSQL that does not
            answer yet.
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
        extra_values: ExtraValuesFunction | None = None,
        schema: str | None = None,
        field_for_payload: PayloadField = "Bytea",
        check_schema: SchemaCheck = "error",
        run_migrations: bool = False,
        notify: bool = True,
        listen_dsn: DsnSource | None = None,
        result_ttl: Seconds | None = None,
        failure_ttl: Seconds | None = None,
        progress_ttl: Seconds | None = None,
        prune_interval: Seconds | None = None,
        track: Track | None = None,
        max_payload_bytes: int | None = None,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        retry_timeout: float = DEFAULT_RETRY_TIMEOUT,
        command_timeout: float = DEFAULT_COMMAND_TIMEOUT,
        startup_timeout: float = 30.0,
        **engine_kwargs: Any,
    ) -> None:
        super().__init__()
        config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
        self.models: Final = _choose_models(models, config)
        _check_choices(check_schema, track, self.models)
        _check_waiting(notify, listen_dsn, startup_timeout)
        self.track: Final = track
        self._lacks_middleware = False
        self.keep_results: Final = keep_results
        self._config: Final = self.models.config
        self._table: Final = self._config.qualified_name
        self._check_schema: Final = check_schema
        self._run_migrations: Final = run_migrations
        self._startup_timeout: Final = startup_timeout
        retention = Retention(result_ttl, failure_ttl)
        codec = Codec(self._config, serializer, max_payload_bytes, retention)
        self._decoder: Final = RowDecoder(codec, self.models)
        self._settings: Final = Settings(
            self.models,
            codec,
            None if extra_values is None else ExtraValues(extra_values, self.models),
            keep_results=keep_results,
            notify=notify,
            is_tracked=track is not None,
            progress_ttl=check_seconds("progress_ttl", progress_ttl),
            prune_interval=check_seconds("prune_interval", prune_interval),
        )
        self._parts: Parts | None = None
        self._telemetry: Final = Telemetry(self._table)
        self._telemetry.listener = self._listener_state
        self._telemetry.waiters = self._count_waiters
        self._store: Final = Store(
            dsn,
            engine=engine,
            engine_kwargs=engine_kwargs,
            max_connections=max_connections,
            listen_dsn=listen_dsn,
            retry_timeout=retry_timeout,
            command_timeout=command_timeout,
            on_retry=self._telemetry.note_retry,
        )

    async def startup(self) -> None:
        """Makes the engine and looks at the tables; may be repeated, on another event loop too.

        Raises:
            SchemaError: The tables are absent or unfit; names the differences and the remedy.
            StorageError: PostgreSQL could not be reached.
            ConfigurationError: The engine cannot be made.
        """
        was_opened = await self._store.open()
        if was_opened:
            self._parts = Parts.make(self._settings, self._store, self._telemetry)
        try:
            if self._run_migrations:
                # Here, because Alembic is slow to import and only this needs it.
                from taskiq_sa_pg.provisioning import provision  # noqa: PLC0415

                await provision(self._store, self._config, self._startup_timeout)
            await self._look_at_schema()
        except BaseException:
            if was_opened:
                self._parts = None
                await self._store.close()
            raise
        await super().startup()

    async def shutdown(self) -> None:
        """Ends what was accepted, and disposes the backend's own engine. May be repeated.

        Later calls, and those that wait for a result, get NotStartedError. A given engine is left
        alone.
        """
        parts, self._parts = self._parts, None
        if parts is not None:
            try:
                # What waits on another event loop, one that has ended, cannot be ended from here.
                if self._store.is_open:
                    await parts.close()
            finally:
                await self._store.close()
        await super().shutdown()

    async def set_result(self, task_id: str, result: TaskiqResult[_ReturnType]) -> None:
        """Stores a result, over an earlier one unless that is of a later attempt.

        A value that cannot be serialized, or is too large, is stored as an error result, so that
        whoever waits for it gets an answer.

        Raises:
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL refused the row or could not be reached.
        """
        column_id = self._config.to_column_task_id(task_id)
        started = self._started
        if started.pruner is not None:
            # Not at startup: processes that only ask for results need not prune them.
            started.pruner.start()
        if self.track is not None and not self._lacks_middleware:
            self._look_for_middleware(task_id, result)
        await started.operations.set_result(column_id, task_id, result)

    async def is_result_ready(self, task_id: str) -> bool:
        """Whether there is a result; progress alone makes none.

        Raises:
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        return await self._started.results.is_ready(task_id)

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
        result = await self._started.results.get(task_id, with_logs)
        if result is None:
            raise ResultIsMissingError(task_id, self._table)
        return result

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
        _refuse_str("get_results", task_ids)
        return await self._started.results.get_all(task_ids, with_logs)

    async def set_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        """Stores progress, replacing what was there.

        Raises:
            ResultSerializationError: The serializer cannot hold the metadata.
            PayloadTooLargeError: The metadata is larger than max_payload_bytes.
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL refused the row or could not be reached.
        """
        column_id = self._config.to_column_task_id(task_id)
        await self._started.operations.set_progress(column_id, task_id, progress)

    async def get_progress(self, task_id: str) -> TaskProgress[Any] | None:
        """The last progress, which outlives the result; None if there never was one.

        Raises:
            ResultDecodeError: The metadata cannot be read back.
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        return await self._started.results.get_progress(task_id)

    @overload
    async def wait_result(
        self, task: AsyncTaskiqTask[_T], timeout: float | None = ..., with_logs: bool = ...
    ) -> TaskiqResult[_T]: ...
    @overload
    async def wait_result(
        self, task: str, timeout: float | None = ..., with_logs: bool = ...
    ) -> TaskiqResult[_ReturnType]: ...
    async def wait_result(
        self, task: Task[Any], timeout: float | None = None, with_logs: bool = False
    ) -> TaskiqResult[Any]:
        """The result, as soon as it is stored.

        A task's declared return type is restored, as the task's own wait_result() does. With
        keep_results=False one of several waiters gets the result, and the others wait on.

        Args:
            task: What kiq() returned, or a task id.
            timeout: Seconds to wait; None, or as for taskiq a negative number, sets no limit.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TaskiqResultTimeoutError: There was no result in time.
            ResultDecodeError: The result cannot be read back; it stays in the table.
            NotStartedError: Before startup(), or the backend was shut down meanwhile.
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        return await self._started.results.wait(task, timeout, with_logs)

    @overload
    async def wait_results(
        self,
        tasks: Iterable[AsyncTaskiqTask[_T]],
        timeout: float | None = ...,
        with_logs: bool = ...,
    ) -> list[TaskiqResult[_T]]: ...
    @overload
    async def wait_results(
        self, tasks: Iterable[str], timeout: float | None = ..., with_logs: bool = ...
    ) -> list[TaskiqResult[_ReturnType]]: ...
    @overload
    async def wait_results(
        self, tasks: Iterable[Task[Any]], timeout: float | None = ..., with_logs: bool = ...
    ) -> list[TaskiqResult[Any]]: ...
    async def wait_results(
        self, tasks: Iterable[Task[Any]], timeout: float | None = None, with_logs: bool = False
    ) -> list[TaskiqResult[Any]]:
        """The results of several tasks in their order, as soon as all are stored.

        With keep_results=False none is deleted before all are there.

        Args:
            tasks: What kiq() returned, or task ids.
            timeout: Seconds to wait for all of them; as for wait_result().
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TaskiqResultTimeoutError: Not all results were there in time.
            ResultIsMissingError: Somebody else deleted a result as soon as it was there.
            ResultDecodeError: A result cannot be read back; it stays in the table.
            NotStartedError: Before startup(), or the backend was shut down meanwhile.
            InvalidTaskIdError: The task-id column cannot hold one of the ids.
            StorageError: PostgreSQL could not be asked.
            TypeError: tasks is one str, whose letters would be taken for ids.
        """
        _refuse_str("wait_results", tasks)
        return await self._started.results.wait_all(tasks, timeout, with_logs)

    @overload
    def as_completed(
        self,
        tasks: Iterable[AsyncTaskiqTask[_T]],
        timeout: float | None = ...,
        with_logs: bool = ...,
    ) -> AsyncGenerator[tuple[AsyncTaskiqTask[_T], TaskiqResult[_T]], None]: ...
    @overload
    def as_completed(
        self, tasks: Iterable[str], timeout: float | None = ..., with_logs: bool = ...
    ) -> AsyncGenerator[tuple[str, TaskiqResult[_ReturnType]], None]: ...
    @overload
    def as_completed(
        self, tasks: Iterable[Task[Any]], timeout: float | None = ..., with_logs: bool = ...
    ) -> AsyncGenerator[tuple[Task[Any], TaskiqResult[Any]], None]: ...
    def as_completed(
        self, tasks: Iterable[Task[Any]], timeout: float | None = None, with_logs: bool = False
    ) -> AsyncGenerator[tuple[Any, TaskiqResult[Any]], None]:
        """Iterates over several tasks with their results, as they complete.

            async for task, result in backend.as_completed(tasks): ...

        With keep_results=False a result is deleted as it comes; one that somebody else deletes
        first does not come.

        Args:
            tasks: What kiq() returned, or task ids.
            timeout: Seconds until the last result; as for wait_result().
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TaskiqResultTimeoutError: Not all results were there in time.
            ResultDecodeError: A result cannot be read back; it stays in the table.
            NotStartedError: Before startup(), or the backend was shut down meanwhile.
            InvalidTaskIdError: The task-id column cannot hold one of the ids.
            StorageError: PostgreSQL could not be asked.
            TypeError: tasks is one str, whose letters would be taken for ids.
        """
        _refuse_str("as_completed", tasks)
        return self._started.results.as_completed(tasks, timeout, with_logs)

    def watch_progress(
        self, task: Task[Any], timeout: float | None = None
    ) -> AsyncGenerator[TaskProgress[Any], None]:
        """Iterates over a task's progress, each time it has changed, until the result is there.

            async for progress in backend.watch_progress(task): ...

        The first is the progress as it is now, if there is one. Of changes that follow each other
        faster than they are taken, the last comes.

        Args:
            task: What kiq() returned, or a task id.
            timeout: Seconds until the result; as for wait_result().

        Raises:
            TaskiqResultTimeoutError: There was no result in time.
            ResultDecodeError: The metadata cannot be read back.
            NotStartedError: Before startup(), or the backend was shut down meanwhile.
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        return self._started.results.watch_progress(task, timeout)

    async def get_status(self, task_id: str) -> TaskStatus:
        """What a task is at: "queued", "started", "retrying", "succeeded", "failed" and so on.

        Without track= it is "unknown" until there is a result. A result that was deleted, be it
        because it was read once or because prune() found it expired, is "unknown" again.

        Raises:
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL could not be asked.
        """
        column_id = self._config.to_column_task_id(task_id)
        return await self._started.tracking.read(column_id, task_id)

    async def get_running(self, limit: int = 1_000) -> list[TaskStatus]:
        """The tasks that are being executed, those that were started first before the others.

        One whose worker was killed stays among them until it is started again or, with
        progress_ttl, pruned.

        Args:
            limit: How many at most.

        Raises:
            ConfigurationError: limit is not above 0.
            NotStartedError: Before startup().
            StorageError: PostgreSQL could not be asked.
        """
        check_limits(limit, None)
        return await self._started.tracking.read_running(limit)

    async def set_status(self, status: TaskStatus) -> None:
        """Stores that a task is "queued", "started" or "retrying"; with "unknown", forgets it.

        TaskMetadataMiddleware does it for the tasks of its broker. A status of a later attempt
        stays, and so does one of the same attempt that was started later. Its finished_at is not
        used.

        Raises:
            ConfigurationError: Without track=, or another state.
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold this id.
            StorageError: PostgreSQL refused the row or could not be reached for 5 seconds.
        """
        if self.track is None:
            raise ConfigurationError('set_status() is for backends with track="started"')
        check_status(status)
        column_id = self._config.to_column_task_id(status.task_id)
        await self._started.tracking.write(column_id, status)

    def decode(self, row: object, with_logs: bool = False) -> TaskiqResult[Any]:
        """The result in a row that you have selected yourself, whether it has expired or not.

        It asks nothing and needs no startup(), so it works with a synchronous Session too.

        Args:
            row: An instance of models.Result, a Row with one in it, or a Row or mapping of its
                columns by their names. `is_err`, `return_value`, `error` and `execution_time` must
                be there, and are as SQLAlchemy's types give them; without `labels` there are none.
            with_logs: Whether to fill the deprecated field `log`, which then must be there too.

        Raises:
            MissingColumnsError: The select has left columns out.
            ResultDecodeError: A value cannot be read back.
            TypeError: It is no row, or one with several results.
        """
        return self._decoder.decode(row, with_logs=with_logs)

    def iter_results(
        self,
        where: Where = (),
        *,
        order_by: OrderBy = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
        with_logs: bool = False,
    ) -> AsyncGenerator[tuple[str, TaskiqResult[_ReturnType]], None]:
        """Iterates over the results that meet conditions, with their task ids.

            async for task_id, result in backend.iter_results(models.Result.is_err): ...

        They are those of one moment, without the expired ones, and none is deleted. A server-side
        cursor gives them a batch at a time, so that memory does not grow with their number. Until
        the end it has a connection of its own, beside max_connections, and a transaction, which
        keeps PostgreSQL from cleaning up: do not dawdle, and where you stop before the end, close
        the generator (`contextlib.aclosing`).

        A result that cannot be read back comes as a failure whose `error` is the
        ResultDecodeError, so that those behind it come too.

        Args:
            where: A condition on the attributes of models.Result, or several, which all must hold.
            order_by: What to order by, one expression or several; without, it is any order.
            batch_size: How many rows are fetched and kept in memory at once.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TypeError: where or order_by is no SQLAlchemy expression.
            ConfigurationError: They are about another class or table, or batch_size is below 1.
            NotStartedError: Before startup(), or the backend was shut down meanwhile.
            StorageError: PostgreSQL refused it or could not be reached. Before the first result
                it is tried again; later, when the connection is lost, the rest does not come.
        """
        statement = find_results(self.models, where, order_by, batch_size)
        return self._started.asking.iterate(statement, batch_size, with_logs)

    async def forget(self, task_ids: Iterable[str]) -> int:
        """Deletes results, unread, with progress and status of these tasks.

        In a statement for every 200 ids, each committed by itself. It tells nobody: whoever waits
        for one of them waits on.

        Args:
            task_ids: Any number of tasks.

        Returns:
            How many results there were, expired ones that were not yet pruned included.

        Raises:
            NotStartedError: Before startup().
            InvalidTaskIdError: The task-id column cannot hold one of the ids; nothing is deleted.
            StorageError: PostgreSQL refused it or could not be reached. What was deleted stays so.
            TypeError: task_ids is one str, whose letters would be taken for ids.
        """
        _refuse_str("forget", task_ids)
        column_ids = {self._config.to_column_task_id(task_id) for task_id in task_ids}
        return await self._started.asking.forget(column_ids)

    async def prune(self, limit: int | None = None, time_budget: Seconds | None = None) -> Pruned:
        """Deletes expired results with their progress, and what is older than progress_ttl.

        In statements of at most 100 rows, each committed by itself, that wait for nobody: what
        somebody else has locked is left for the next time.

        Args:
            limit: How many rows to delete at most; progress and status of expired results are not
                counted.
            time_budget: Seconds, or a timedelta, after which no further statement is begun.

        Raises:
            ConfigurationError: limit or time_budget is not above 0.
            NotStartedError: Before startup().
            StorageError: PostgreSQL refused it or could not be reached. What was deleted stays so.
        """
        seconds = check_limits(limit, time_budget)
        return await self._started.pruning.run(limit, seconds)

    def stats(self) -> Stats:
        """What this backend has done since it was made; asks nobody, and may be called any time.

        The same goes to OpenTelemetry, where `opentelemetry-api` is installed (the extra `otel`)
        and the application has set up an SDK.
        """
        return self._telemetry.stats

    async def _look_at_schema(self) -> None:
        if self._check_schema == "off":
            return
        extra_values = self._settings.extra_values
        try:
            features = await check(
                self._store,
                self.models,
                self._startup_timeout,
                extra_columns={} if extra_values is None else extra_values.columns,
                is_tracked=self._settings.is_tracked,
            )
        except SchemaError as exc:
            if self._check_schema == "error":
                raise
            logger.warning("%s", exc)
        else:
            self._started.layout.expect(features)

    def _listener_state(self) -> ListenerState:
        if self._parts is not None:
            return self._parts.waiting.listener_state
        return "idle" if self._settings.notify else "off"

    def _count_waiters(self) -> int:
        return 0 if self._parts is None else self._parts.waiting.waiters

    def _look_for_middleware(self, task_id: str, result: TaskiqResult[Any]) -> None:
        if metadata_of(result) is NO_METADATA:
            self._lacks_middleware = True
            logger.warning(
                'task %s: track="started" needs TaskMetadataMiddleware, and its broker has none: '
                "broker.add_middlewares(TaskMetadataMiddleware())",
                task_id,
            )

    @property
    def _started(self) -> Parts:
        if self._parts is None:
            raise NotStartedError(
                "the result backend is not started: call `await broker.startup()` (or the "
                "backend's own startup()) first"
            )
        return self._parts


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


def _check_choices(check_schema: object, track: object, models: Models) -> None:
    if check_schema not in get_args(SchemaCheck):
        raise ConfigurationError(
            f'check_schema must be "error", "warn" or "off", not {check_schema!r}'
        )
    if track is None:
        return
    if track not in get_args(Track):
        raise ConfigurationError(f'track must be "started" or None, not {track!r}')
    if models.status_table is None:
        raise ConfigurationError(
            "track needs a status table: subclass StatusMixin on your Base, and pass "
            "models=Models(Result, Progress, Status)"
        )


def _check_waiting(notify: bool, listen_dsn: DsnSource | None, startup_timeout: float) -> None:
    if listen_dsn is not None and not notify:
        raise ConfigurationError("listen_dsn is for notify=True; with notify=False leave it out")
    if startup_timeout < 0:
        raise ConfigurationError(f"startup_timeout must be 0 or more, not {startup_timeout}")


def _refuse_str(name: str, tasks: object) -> None:
    if isinstance(tasks, str):
        raise TypeError(f"{name}() takes several tasks, not one str: {tasks!r}")
