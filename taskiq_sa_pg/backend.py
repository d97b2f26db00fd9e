"""SQLAlchemyResultBackend: implements taskiq's contract; checks arguments and delegates."""

from typing import Any, TypeVar, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import AsyncResultBackend, TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.background import leave_to_parent
from taskiq_sa_pg.codec import Codec, Retention, Seconds, check_seconds
from taskiq_sa_pg.database import (
    DEFAULT_COMMAND_TIMEOUT,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_RETRY_TIMEOUT,
    Database,
    DsnSource,
    check_loop,
    repr_at,
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
    choose_models,
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
    """Stores task results and task progress in tables of your PostgreSQL database.

    Nothing connects before startup(), which the broker calls. Every write is committed when its
    call returns. A task id is a str; with "Uuid" it may also be a uuid.UUID. Methods that query
    PostgreSQL raise NotStartedError before startup(), InvalidTaskIdError for a task id that the
    column cannot store, and StorageError if PostgreSQL rejects a statement or is unreachable.
    Their own docstrings list the other errors only. Methods that wait also raise NotStartedError
    if the backend is shut down while they wait.

    Args:
        dsn: Database address: `postgresql://...` (asyncpg), `postgresql+psycopg://...`, several
            hosts in libpq's form, a sqlalchemy.URL, or a callable without arguments that returns
            one and is called for every new connection. The backend owns the engine.
        keep_results: False deletes a result and its progress in the transaction that reads it,
            so exactly one reader receives it. If that reader is cancelled at the last moment,
            the result is stored again.
        table_name: Name of the results table, without its schema. The other tables are named
            `<table_name>_progress`, `<table_name>_status` and `<table_name>_workers`.
        field_for_task_id: Type of the task-id columns. "Uuid" accepts UUIDs only.
        serializer: Converts values to bytes. None is PickleSerializer, or JSONSerializer with
            "Jsonb".
        engine: Your AsyncEngine, instead of dsn. It is borrowed: the backend never disposes it
            and does not change it for its other users.
        models: Models of the tables, from build_models() or your own. None uses those for the
            names and types given here, which all backends with the same ones share.
        extra_values: Called with the task id and the TaskiqResult before set_result() stores it.
            Returns a dict of values for your own columns in models.Result, by attribute; they are
            stored in the same row and statement. None is NULL. A column without a key keeps its
            value, or gets its default in a new row. If the function raises or PostgreSQL rejects
            a value, an error is logged and the result is stored without these values. The
            function must not be async, and should be fast.
        schema: PostgreSQL schema of the tables. None uses the search_path.
        field_for_payload: Type of return_value, error and meta. "Jsonb" can be read and filtered
            in SQL, and needs a serializer that writes JSON.
        check_schema: What startup() does if tables are missing or do not match: "error" raises
            SchemaError, "warn" logs a warning, "off" skips the check.
        run_migrations: True creates or upgrades the tables in startup(), under a lock. The role
            needs the privileges to create them.
        notify: Whether to send a notification for each stored value, and to listen for them.
            False polls ten times a second instead.
        listen_dsn: Address for the listening connection, if dsn or engine connects through a
            transaction pooler or to a read replica. None uses the same address.
        result_ttl: Seconds, or a timedelta, after which a success expires, counted from its
            completion by the database's clock. No read returns an expired result, and prune()
            deletes it. A task's `result_ttl` label (seconds or None) overrides it. None keeps
            results for ever.
        failure_ttl: The same for failures, with the label `failure_ttl`.
        progress_ttl: Seconds, or a timedelta, since their last change after which prune() deletes
            the progress and status of a task that has no result. None keeps them for ever.
        prune_interval: Seconds, or a timedelta, between background runs of prune() in every
            process that stores results; one process at a time prunes. None disables them.
        track: "started" stores the status of unfinished tasks, for get_status(), get_running() and
            get_workers(). The broker needs TaskMetadataMiddleware, which writes the status before a
            task is sent and before it is started. None stores no status.
        max_payload_bytes: Maximum size in bytes of a serialized return value, exception or
            progress metadata. A larger result is stored as an error result, so that waiting
            clients get an answer. None leaves only PostgreSQL's own limit.
        max_connections: Maximum number of connections in use at once, not counting the listening
            connection.
        retry_timeout: Seconds for which a statement is retried after a transient error: a lost
            connection, a restart, a failover, a deadlock. Retries start and end within this time.
            0 disables retries.
        command_timeout: Seconds that one attempt may take. A server that does not answer within
            this time is treated as a lost connection.
        startup_timeout: Seconds that startup() waits in total for a PostgreSQL that does not
            answer yet.
        gather_window: Maximum seconds that a write waits for other writes to share its statement.
            Writes wait only while separate asyncio tasks write in quick succession, as in a worker.
            Repeated writes of one task, slow streams of writes, and reads never wait. 0 disables
            it.
        **engine_kwargs: Passed to create_async_engine(), with dsn only. Unless you choose a pool,
            pool_size is 5 and max_overflow is 0.

    Attributes:
        models: The tables as declarative classes.

    Raises:
        ConfigurationError: An argument is invalid, or two arguments contradict each other.
    """

    _runtime: Runtime | None = None
    _users = 0  # how many times it was started
    _processes: frozenset[WorkerProcess] = frozenset()  # their beats begin with startup()

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
        self.models = models = choose_models(models, config)
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

    def __repr__(self) -> str:
        return repr_at(type(self).__qualname__, self.settings.table, self._database.place)

    @property
    def keep_results(self) -> bool:
        """Whether results are kept after they are read."""
        return self.settings.keep_results

    @property
    def track(self) -> Track | None:
        """Which statuses are stored: "started", or None for none."""
        return self.settings.track

    @property
    def is_started(self) -> bool:
        """Whether startup() was called, and shutdown() was not."""
        return self._runtime is not None

    @property
    def database(self) -> Database:
        """The database layer; internal to the package."""
        return self._database

    @database.setter
    def database(self, database: Database) -> None:
        self._database = database

    @property
    def runtime(self) -> Runtime:
        """The objects that exist between startup() and shutdown(); internal to the package.

        Raises:
            NotStartedError: It is not started, or was started on another event loop.
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
        """Creates the engine and checks the tables. May be repeated, also on another event loop.

        Raises:
            SchemaError: Tables are missing or do not match; lists the differences and the remedy.
            ConfigurationError: The engine cannot be created, or your engine prepares statements
                and connects through a pooler.
        """
        settings = self.settings
        was_opened = await self._database.open(
            settings.timings, retry_timeout=settings.startup_timeout
        )
        if was_opened:
            if self._runtime is not None:
                leave_to_parent(self._runtime.loop, self._runtime)
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
        """Completes accepted calls, and disposes the engine unless it is borrowed. May be repeated.

        Later calls, and calls that wait for a result, raise NotStartedError. If startup() was
        called several times, for example by two brokers that share the backend, call shutdown()
        as many times; only the last call has an effect.
        """
        self._users -= 1
        if self._users > 0 and self._runtime is not None and self._database.is_open:
            return
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            try:
                # Waiters on another event loop, which has ended, cannot be ended from here.
                if self._database.is_open:
                    await runtime.close()
            finally:
                await self._database.close()
        await super().shutdown()

    def expect_worker(self, process: WorkerProcess) -> None:
        """Makes the next startup() begin the beat of a process; internal to the package."""
        self._processes |= {process}

    async def end_worker(self, process: WorkerProcess) -> None:
        """Ends the beat that expect_worker() or the process's first task began; internal."""
        self._processes -= {process}
        if self._runtime is not None and self._database.is_open:
            await self._runtime.workers.end(process)

    async def set_result(self, task_id: str | UUID, result: TaskiqResult[_ReturnType]) -> None:
        """Stores a result. It replaces an existing one unless that belongs to a later attempt.

        A value that cannot be serialized, or is too large, is stored as an error result, so that
        waiting clients get an answer.
        """
        column_id = self._config.to_column_task_id(task_id)
        runtime = self.runtime
        # Not at startup: processes that only read results need not prune them.
        runtime.pruner.start()
        text = task_id if isinstance(task_id, str) else str(task_id)
        await runtime.writer.set_result(column_id, text, result)

    async def is_result_ready(self, task_id: str | UUID) -> bool:
        """Whether the task has a result. Progress alone does not count as a result."""
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
        """Returns the result. With keep_results=False it is deleted when it is read.

        Args:
            task_id: The task.
            with_logs: Whether to fill the deprecated field `log`.
            return_type: Type of a success's return value: a pydantic model, a dataclass or another
                type that pydantic can validate, such as `list[Order]`. If validation fails, a
                warning is logged and the stored value is returned unchanged.

        Raises:
            ResultIsMissingError: The task has no result, or no longer has one.
            ResultDecodeError: The result cannot be decoded; it is not deleted.
            ConfigurationError: with_logs is a type.
        """
        if not isinstance(with_logs, int):
            raise ConfigurationError(
                f"with_logs must be True or False: pass {with_logs!r} as return_type="
            )
        column_id = self._config.to_column_task_id(task_id)
        result = await self.runtime.reader.get(column_id, with_logs)
        if result is None:
            raise ResultIsMissingError(task_id, self._config.qualified_name)
        return restore(task_id, result, return_type)

    async def set_progress(self, task_id: str | UUID, progress: TaskProgress[Any]) -> None:
        """Stores progress. It replaces the previous progress of the task.

        Raises:
            ResultSerializationError: The metadata cannot be serialized.
            PayloadTooLargeError: The metadata is larger than max_payload_bytes.
        """
        column_id = self._config.to_column_task_id(task_id)
        await self.runtime.writer.set_progress(column_id, progress)

    async def get_progress(self, task_id: str | UUID) -> TaskProgress[Any] | None:
        """Returns the latest progress, which is kept after the result is stored; None if none.

        Raises:
            ResultDecodeError: The metadata cannot be decoded.
        """
        reader = self.runtime.reader
        row = await reader.read_progress(self._config.to_column_task_id(task_id))
        return None if row is None else reader.decode_progress(row)

    def stats(self) -> Stats:
        """Returns counts since the backend was created. It runs no query; call it at any time.

        OpenTelemetry receives the same figures if `opentelemetry-api` is installed (the extra
        `otel`) and the application has set up an SDK.
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
        raise ConfigurationError("listen_dsn needs notify=True: omit it, or set notify=True")
    return listen_dsn
