"""SQLAlchemyResultBackend: taskiq's contract. It checks arguments and hands on."""

from dataclasses import asdict
from typing import Any, TypeVar, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import AsyncResultBackend, TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.codec import Codec, Retention, Seconds, check_seconds
from taskiq_sa_pg.database import (
    DEFAULT_COMMAND_TIMEOUT,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_RETRY_TIMEOUT,
    Database,
    DsnSource,
    check_loop,
)
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    NotStartedError,
    ResultIsMissingError,
    well_spelled,
)
from taskiq_sa_pg.models import (
    DEFAULT_TABLE_NAME,
    Models,
    PayloadField,
    TableConfig,
    TaskIdField,
    build_models,
)
from taskiq_sa_pg.results import (
    DEFAULT_GATHER_WINDOW,
    ExtraValues,
    ExtraValuesFunction,
    ResultMethods,
    Runtime,
    Settings,
    Track,
    WorkerProcess,
    restore,
)
from taskiq_sa_pg.schema import SchemaCheck
from taskiq_sa_pg.telemetry import ListenerState, Stats, Telemetry

_ReturnType = TypeVar("_ReturnType")
_T = TypeVar("_T")


class SQLAlchemyResultBackend(ResultMethods[_ReturnType], AsyncResultBackend[_ReturnType]):
    """Keeps task results and task progress in tables of your PostgreSQL.

    Nothing connects before startup(), which the broker calls. Every write is committed when its
    call returns. A task id is a str or, with "Uuid", a uuid.UUID as well. All methods that ask
    PostgreSQL raise NotStartedError before startup(), InvalidTaskIdError for a task id that the
    column cannot hold, and StorageError where PostgreSQL refused a statement or could not be
    reached; below are only the errors beside these. Those that wait raise NotStartedError, too,
    when the backend is shut down meanwhile.

    Args:
        dsn: Address of the database: `postgresql://...` (asyncpg), `postgresql+psycopg://...`,
            several hosts in libpq's form, a sqlalchemy.URL, or a callable without arguments
            that returns one and is asked again for every new connection. The engine made from
            it belongs to the backend.
        keep_results: False deletes a result, with its progress, in the transaction that reads
            it: of many readers exactly one gets it. What was deleted for a reader who was
            cancelled in the last moment is stored again.
        table_name: The results table, without its schema; the progress table is
            `<table_name>_progress`.
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
            SchemaError, "warn" logs it, "off" does not look.
        run_migrations: True makes or upgrades the tables at startup(), under a lock; the role
            then needs the right to create them.
        notify: Whether to tell waiting processes of what was stored, and to listen for it. False
            sends no notifications, and waiting looks ten times a second.
        listen_dsn: Address for the listening connection, where the other leads through a
            transaction pooler or to a read replica. None takes the other.
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
            answer; None sets no limit but PostgreSQL's own.
        max_connections: The most connections that are in use at once, the listening one aside.
        retry_timeout: For how many seconds a statement is tried again after a fault that passes:
            a lost connection, a restart, a failover, a deadlock. 0 tries once. No repetition
            begins later, or lasts longer.
        command_timeout: How many seconds one attempt may take; a server that is silent for so
            long counts as lost.
        startup_timeout: For how many seconds startup() waits for a PostgreSQL that does not
            answer yet, in all.
        gather_window: For how many seconds at most a write waits for others to share its
            statement, while tasks of their own write in quick succession, as in a busy worker. A
            task that writes again and again, a slow stream and reads never wait. 0 turns it off.
        **engine_kwargs: With dsn: passed on to create_async_engine(). Where no pool is chosen,
            pool_size is 5 and max_overflow 0.

    Attributes:
        models: The tables as declarative classes.

    Raises:
        ConfigurationError: An argument that cannot work, or two that contradict each other.
    """

    _runtime: Runtime | None = None
    _users = 0  # how often it was started
    _processes: frozenset[WorkerProcess] = frozenset()  # whose beat begins with startup()

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
        gather_window: float = DEFAULT_GATHER_WINDOW,
        **engine_kwargs: Any,
    ) -> None:
        super().__init__()
        config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
        self.models = models = _choose_models(models, config)
        self._config = models.config
        retention = Retention(result_ttl, failure_ttl)
        self.settings = Settings(
            models=models,
            codec=Codec(models.config, serializer, max_payload_bytes, retention),
            extra_values=None if extra_values is None else ExtraValues(extra_values, models),
            keep_results=keep_results,
            notify=notify,
            track=track,
            progress_ttl=check_seconds("progress_ttl", progress_ttl),
            prune_interval=check_seconds("prune_interval", prune_interval),
            check_schema=check_schema,
            run_migrations=run_migrations,
            startup_timeout=startup_timeout,
            gather_window=gather_window,
        )
        self._telemetry = Telemetry(self.settings.table, self._listener_state, self._count_waiters)
        self._database = Database(
            dsn,
            engine=engine,
            engine_kwargs=well_spelled(engine_kwargs, SQLAlchemyResultBackend),
            max_connections=max_connections,
            listen_dsn=_for_listening(listen_dsn, notify),
            retry_timeout=retry_timeout,
            command_timeout=command_timeout,
            on_retry=self._telemetry.note_retry,
        )

    @property
    def keep_results(self) -> bool:
        """Whether results stay when they are read."""
        return self.settings.keep_results

    @property
    def track(self) -> Track | None:
        """Which statuses are kept."""
        return self.settings.track

    @property
    def is_started(self) -> bool:
        """Whether it is between startup() and shutdown()."""
        return self._runtime is not None

    @property
    def database(self) -> Database:
        """Where it stores; the package's own."""
        return self._database

    @property
    def runtime(self) -> Runtime:
        """What works between startup() and shutdown(); the package's own.

        Raises:
            NotStartedError: It is not started, or was on another event loop.
        """
        runtime = self._runtime
        if runtime is None:
            raise NotStartedError(
                "the result backend is not started: call `await broker.startup()` (or the "
                "backend's own startup()) first"
            )
        check_loop(runtime.loop)
        return runtime

    async def startup(self) -> None:
        """Makes the engine and looks at the tables; may be repeated, on another event loop too.

        Raises:
            SchemaError: The tables are absent or unfit; names the differences and the remedy.
            ConfigurationError: The engine cannot be made, or your engine prepares statements and
                leads through a pooler.
        """
        settings = self.settings
        was_opened = await self._database.open(
            settings.timings, retry_timeout=settings.startup_timeout
        )
        if was_opened:
            self._runtime = Runtime(settings, self._database, self._telemetry)
            self._users = 0
        try:
            await self.runtime.prepare()
        except BaseException:
            if was_opened:
                self._runtime = None
                await self._database.close()
            raise
        self._users += 1
        for process in self._processes:
            self.runtime.workers.begin(process)
        await super().startup()

    async def shutdown(self) -> None:
        """Ends what was accepted, and disposes the backend's own engine. May be repeated.

        Later calls, and those that wait for a result, get NotStartedError. A given engine is left
        alone. Where startup() was called several times, as by two brokers that share the backend,
        the last of as many calls does it.
        """
        self._users -= 1
        if self._users > 0 and self._runtime is not None and self._database.is_open:
            return
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            try:
                # What waits on another event loop, one that has ended, cannot be ended from here.
                if self._database.is_open:
                    await runtime.close()
            finally:
                await self._database.close()
        await super().shutdown()

    def expect_worker(self, process: WorkerProcess) -> None:
        """Has the next startup() begin the beat of a process; the package's own."""
        self._processes |= {process}

    async def end_worker(self, process: WorkerProcess) -> None:
        """Ends what expect_worker(), or the process's first task, has begun; the package's own."""
        self._processes -= {process}
        if self._runtime is not None and self._database.is_open:
            await self._runtime.workers.end(process)

    async def set_result(self, task_id: str | UUID, result: TaskiqResult[_ReturnType]) -> None:
        """Stores a result, over an earlier one unless that is of a later attempt.

        A value that cannot be serialized, or is too large, is stored as an error result, so that
        whoever waits for it gets an answer.
        """
        column_id = self._config.to_column_task_id(task_id)
        runtime = self.runtime
        # Not at startup: processes that only ask for results need not prune them.
        runtime.pruner.start()
        text = task_id if isinstance(task_id, str) else str(task_id)
        await runtime.writer.set_result(column_id, text, result)

    async def is_result_ready(self, task_id: str | UUID) -> bool:
        """Whether there is a result; progress alone makes none."""
        column_id = self._config.to_column_task_id(task_id)
        return await self.runtime.reader.is_ready(column_id)

    @overload
    async def get_result(
        self, task_id: str | UUID, with_logs: bool = ..., *, return_type: None = ...
    ) -> TaskiqResult[_ReturnType]: ...
    @overload
    async def get_result(
        self, task_id: str | UUID, with_logs: bool = ..., *, return_type: type[_T]
    ) -> TaskiqResult[_T]: ...
    @overload
    async def get_result(
        self, task_id: str | UUID, with_logs: bool = ..., *, return_type: Any
    ) -> TaskiqResult[Any]: ...
    async def get_result(
        self, task_id: str | UUID, with_logs: bool = False, *, return_type: Any = None
    ) -> TaskiqResult[Any]:
        """The result; with keep_results=False it is deleted as it is read.

        Args:
            task_id: The task.
            with_logs: Whether to fill the deprecated field `log`.
            return_type: What to make of the return value of a success: a pydantic model, a
                dataclass or another type that pydantic can validate, such as `list[Order]`. A value
                that does not fit is logged as a warning, and returned as it was stored.

        Raises:
            ResultIsMissingError: There is no result (any more).
            ResultDecodeError: The result cannot be read back; it stays in the table.
            ConfigurationError: with_logs is a type.
        """
        if not isinstance(with_logs, int):
            raise ConfigurationError(
                f"with_logs must be True or False: give {with_logs!r} as return_type="
            )
        column_id = self._config.to_column_task_id(task_id)
        result = await self.runtime.reader.get(column_id, with_logs)
        if result is None:
            raise ResultIsMissingError(task_id, self._config.qualified_name)
        return restore(task_id, result, return_type)

    async def set_progress(self, task_id: str | UUID, progress: TaskProgress[Any]) -> None:
        """Stores progress, replacing what was there.

        Raises:
            ResultSerializationError: The serializer cannot hold the metadata.
            PayloadTooLargeError: The metadata is larger than max_payload_bytes.
        """
        column_id = self._config.to_column_task_id(task_id)
        await self.runtime.writer.set_progress(column_id, progress)

    async def get_progress(self, task_id: str | UUID) -> TaskProgress[Any] | None:
        """The last progress, which outlives the result; None if there never was one.

        Raises:
            ResultDecodeError: The metadata cannot be read back.
        """
        reader = self.runtime.reader
        row = await reader.read_progress(self._config.to_column_task_id(task_id))
        return None if row is None else reader.decode_progress(row)

    def stats(self) -> Stats:
        """What this backend has done since it was made; asks nobody, and may be called any time.

        The same goes to OpenTelemetry, where `opentelemetry-api` is installed (the extra `otel`)
        and the application has set up an SDK.
        """
        return self._telemetry.stats

    def _listener_state(self) -> ListenerState:
        if self._runtime is not None:
            return self._runtime.waiters.listener_state
        return "idle" if self.settings.notify else "off"

    def _count_waiters(self) -> int:
        return 0 if self._runtime is None else self._runtime.waiters.waiting


def _for_listening(listen_dsn: DsnSource | None, notify: bool) -> DsnSource | None:
    if listen_dsn is not None and not notify:
        raise ConfigurationError("listen_dsn is for notify=True; else leave it out")
    return listen_dsn


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
