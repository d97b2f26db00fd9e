"""SQLAlchemyBroker: implements taskiq's AsyncBroker on the broker's other modules."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator
from functools import cached_property, partial
from typing import Any, Protocol, cast

from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import AckableMessage, AsyncBroker, BrokerMessage, TaskiqResult

from taskiq_sa_pg import codec
from taskiq_sa_pg.broker.claims import Claim, Claims
from taskiq_sa_pg.broker.methods import QueueMethods
from taskiq_sa_pg.broker.runtime import QueueRuntime
from taskiq_sa_pg.broker.sender import row_of
from taskiq_sa_pg.broker.session import AnySession, SessionBroker, join
from taskiq_sa_pg.broker.settings import (
    DEFAULT_LEASE,
    DEFAULT_MAX_DELIVERIES,
    QueueSettings,
    check_queue_names,
)
from taskiq_sa_pg.broker.ticks import take_tick
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
    SchemaError,
    TaskAbandonedError,
    well_spelled,
)
from taskiq_sa_pg.models import (
    DEFAULT_QUEUE,
    DEFAULT_TABLE_NAME,
    Models,
    TableConfig,
    TaskIdField,
    choose_models,
)
from taskiq_sa_pg.schema import SchemaCheck
from taskiq_sa_pg.statements import Claimed, QueueRow, Upsert, enqueue_tasks
from taskiq_sa_pg.waiting import Listener

logger = logging.getLogger(__name__)


class _Runtime(Protocol):
    listener: Listener | None


class _Sharing(Protocol):
    """A result backend whose connections the broker can use: SQLAlchemyResultBackend."""

    database: Database
    runtime: _Runtime

    async def startup(self) -> None: ...
    async def shutdown(self) -> None: ...


class SQLAlchemyBroker(QueueMethods, AsyncBroker):
    """Sends tasks through a table in your PostgreSQL, from which workers claim them.

    A committed task is delivered at least once, and to one worker at a time as long as that worker
    renews its lease. It is delivered again if the worker dies before it acknowledges the task, or
    if it loses the database or blocks its event loop for longer than the lease. So tasks must
    tolerate running twice; with `ack_type="when_received"` they run at most once. Tasks of higher
    priority come first, then those that are due earlier; the order is not strict.

    If a task is sent again while a worker has claimed it, as retry middlewares do, the new message
    replaces the old one. A waiting task is not replaced.

    Labels of a task: `queue_name`; `priority`, from 0 to 9 (highest); `delay`, in seconds.

    The broker uses the connections of its SQLAlchemyResultBackend if both have the same DSN or
    engine and, if the broker has a listen_dsn or engine arguments, these are the same, too.

    Args:
        dsn: Address of the database, as for SQLAlchemyResultBackend.
        engine: Your AsyncEngine, instead of dsn; it is never disposed.
        models: Models of the tables, with the queue: from build_models(queue=True), or your own.
            None uses those for the names and types given here, which all brokers with the same
            ones share.
        table_name: The results table; the queue's table is `<table_name>_queue`.
        field_for_task_id: Type of the task-id column. "Uuid" accepts UUIDs only.
        schema: PostgreSQL schema of the tables; None uses the search_path.
        queue_name: The queue of tasks without a label `queue_name`, and of workers.
        lease: Seconds for which a worker claims a task. It is renewed after each third of it until
            the task is acknowledged, so tasks may run longer. If a worker dies, its tasks are due
            again after this time at the latest.
        max_deliveries: Maximum number of deliveries of a task. Then it is parked, and a
            TaskAbandonedError is stored as its result.
        check_schema: What startup() does if tables are missing or do not match: "error" raises
            SchemaError, "warn" logs it, "off" does not check.
        run_migrations: True creates or upgrades the tables at startup(), under a lock; the role
            then needs the privilege to create them.
        notify: Whether to notify workers of new tasks. False sends no notifications, and workers
            poll once a second.
        listen_dsn: Address for the LISTEN connection, if dsn goes through a transaction pooler.
            None uses dsn or engine.
        max_connections: Maximum number of connections in use at once, without the LISTEN
            connection.
        retry_timeout: Seconds for which a statement is retried after transient errors.
        command_timeout: Seconds that one attempt may take.
        startup_timeout: Seconds for which startup() retries if PostgreSQL cannot be reached.
        **engine_kwargs: With dsn: passed to create_async_engine().

    Attributes:
        models: The tables as declarative classes.

    Raises:
        ConfigurationError: An argument is invalid, or two contradict each other.
    """

    _runtime: QueueRuntime | None = None
    _users = 0  # the number of startups without a shutdown
    _opening: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    def __init__(
        self,
        dsn: DsnSource | None = None,
        *,
        engine: AsyncEngine | None = None,
        models: Models | None = None,
        table_name: str = DEFAULT_TABLE_NAME,
        field_for_task_id: TaskIdField = "VarChar",
        schema: str | None = None,
        queue_name: str = DEFAULT_QUEUE,
        lease: float = DEFAULT_LEASE,
        max_deliveries: int = DEFAULT_MAX_DELIVERIES,
        check_schema: SchemaCheck = "error",
        run_migrations: bool = False,
        notify: bool = True,
        listen_dsn: DsnSource | None = None,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        retry_timeout: float = DEFAULT_RETRY_TIMEOUT,
        command_timeout: float = DEFAULT_COMMAND_TIMEOUT,
        startup_timeout: float = 30.0,
        **engine_kwargs: Any,
    ) -> None:
        super().__init__()
        config = TableConfig(table_name, field_for_task_id, schema=schema)
        self.models = models = choose_models(models, config, queue=True)
        self.settings = QueueSettings(
            models=models,
            queue_name=queue_name,
            lease=lease,
            max_deliveries=max_deliveries,
            check_schema=check_schema,
            run_migrations=run_migrations,
            notify=notify,
            startup_timeout=startup_timeout,
        )
        if listen_dsn is not None and not notify:
            raise ConfigurationError("listen_dsn needs notify=True: omit it, or set notify=True")
        self._database = Database(
            dsn,
            engine=engine,
            engine_kwargs=well_spelled(engine_kwargs, SQLAlchemyBroker),
            max_connections=max_connections,
            listen_dsn=listen_dsn,
            retry_timeout=retry_timeout,
            command_timeout=command_timeout,
        )
        self._shared: _Sharing | None = None  # the result backend whose connections it uses

    @property
    def runtime(self) -> QueueRuntime:
        """The runtime between startup() and shutdown(); internal.

        Raises:
            NotStartedError: The broker is not started, or was started on another event loop.
        """
        runtime = self._runtime
        if runtime is None:
            raise NotStartedError("the broker is not started: call `await broker.startup()` first")
        check_loop(runtime.loop)
        return runtime

    @property
    def place(self) -> str:
        """The queue's `host:port/database`; empty until a callable has returned the DSN."""
        database = self._database if self._shared is None else self._shared.database
        return database.place

    @property
    def database(self) -> Database:
        """Where its queue is; the package's own."""
        return self._database

    @database.setter
    def database(self, database: Database) -> None:
        self._database = database

    def __repr__(self) -> str:
        return repr_at(type(self).__qualname__, self.settings.table, self.place)

    async def startup(self) -> None:
        """Checks the tables and starts the result backend; may be repeated.

        In a process of `taskiq worker`, a SchemaError is logged in one line and ends the process:
        taskiq would restart it again and again, each time with a traceback.

        Raises:
            SchemaError: Tables are missing or do not match; names the differences and the remedy.
            SystemExit: The same in a process of `taskiq worker`.
            ConfigurationError: The engine cannot be created.
        """
        try:
            await self.hold()
            try:
                await super().startup()
            except BaseException:
                await self.let_go()
                raise
        except SchemaError as exc:
            if not self.is_worker_process:
                raise
            logger.critical("the worker cannot start: %s", exc)
            raise SystemExit(1) from None

    async def shutdown(self) -> None:
        """Releases unacknowledged tasks and shuts down the result backend; may be repeated.

        After several calls of startup(), the last of as many calls of shutdown() does it.
        """
        try:
            await super().shutdown()
        finally:
            await self.let_go()

    async def hold(self) -> None:
        """Opens the connections as startup() does, and nothing else; internal."""
        loop = asyncio.get_running_loop()
        async with self._turns():
            if self._runtime is None or self._runtime.loop is not loop:
                self._runtime = await self._open()
                self._users = 0
            self._users += 1

    async def let_go(self) -> None:
        """Closes the connections after as many calls as of hold(); internal."""
        async with self._turns():
            self._users -= 1
            if self._users > 0:
                return
            runtime, self._runtime = self._runtime, None
            if runtime is None:
                return
            try:
                # Tasks of another event loop, which has ended, cannot be ended here.
                if runtime.loop is asyncio.get_running_loop():
                    await runtime.close()
            finally:
                await self._close_database()

    def _turns(self) -> asyncio.Lock:
        """The lock that serializes opening and closing on the running event loop."""
        loop = asyncio.get_running_loop()
        if self._opening is None or self._opening[0] is not loop:
            self._opening = loop, asyncio.Lock()
        return self._opening[1]

    async def kick(self, message: BrokerMessage) -> None:
        """Sends a message; it is committed on return. taskiq's kicker calls it.

        Raises:
            ConfigurationError: A label is invalid.
            InvalidTaskIdError: The task-id column cannot hold the id.
            StorageError: PostgreSQL could not store it.
        """
        tick = take_tick(message, self.settings)
        row = row_of(self.settings, message)
        if tick is None:
            await self.runtime.send(row)
        else:
            await self.runtime.send_for_tick(tick, row)

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Yields the tasks of its queues as they become due; taskiq's worker calls it."""
        runtime = self.runtime
        consumer = runtime.consume(
            self.queue_names,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            is_known=lambda name: self.find_task(name) is not None,
            abandon=partial(self._abandon, runtime.claims),
        )
        try:
            while True:
                yield await consumer.next()
        finally:
            await runtime.stop(consumer)

    def listening_to(self, *queue_names: str) -> "SQLAlchemyBroker":
        """The same broker for a worker of other queues: `taskiq worker app:mail`.

        It shares everything else with this broker, such as tasks and result backend.

        Args:
            *queue_names: The queues that the worker listens to.

        Raises:
            ConfigurationError: No name, or an invalid one.
        """
        check_queue_names(queue_names)
        return _QueueView(self, queue_names)

    def in_session(self, session: AnySession) -> SessionBroker:
        """Sends tasks in the transaction of a session: they are committed or rolled back with it.

            await broker.in_session(session).kiq(my_task, order.id)

        The broker need not be started. A started broker notifies workers after the commit;
        otherwise a worker finds the task within 5 seconds.

        Args:
            session: A session of the broker's database, sync or async.

        Raises:
            ConfigurationError: The session has another database, or is in AUTOCOMMIT or closed.
        """
        transaction = join(session, self.settings, self._database, self._enqueue, self._note_sent)
        return SessionBroker(self, transaction)

    @property
    def queue_names(self) -> tuple[str, ...]:
        """The queues that its workers listen to."""
        return (self.settings.queue_name,)

    @cached_property
    def _enqueue(self) -> Upsert:
        return enqueue_tasks(self.settings.queue_table)

    def _note_sent(self, rows: list[QueueRow]) -> None:
        if self._runtime is not None:
            self._runtime.note_sent(rows)

    async def _open(self) -> QueueRuntime:
        settings, backend = self.settings, self._find_shared()
        if backend is None:
            _ = await self._database.open(settings.timings, retry_timeout=settings.startup_timeout)
            database, listener = self._database, None
        else:
            await backend.startup()
            database, listener = backend.database, backend.runtime.listener
        self._shared = backend
        try:
            runtime = QueueRuntime(settings, database, listener)
            await runtime.prepare()
        except BaseException:
            await self._close_database()
            raise
        return runtime

    async def _close_database(self) -> None:
        shared, self._shared = self._shared, None
        await (self._database.close() if shared is None else shared.shutdown())

    def _find_shared(self) -> _Sharing | None:
        backend = self.result_backend
        database = getattr(backend, "database", None)
        if isinstance(database, Database) and self._database.leads_where(database):
            return cast("_Sharing", backend)
        return None

    async def _abandon(self, claims: Claims, claimed: Claimed) -> None:
        """Stores an error result for a task that was delivered too often, and parks it."""
        claim = Claim(claimed.task_id, claimed.claim)
        task_id = str(claimed.task_id)
        error = TaskAbandonedError(task_id, claimed.deliveries - 1)
        logger.error("task %s (%s): %s", task_id, claimed.task_name, error)
        result: TaskiqResult[Any] = TaskiqResult(
            is_err=True, return_value=None, execution_time=0, error=error, labels={}
        )
        codec.attach(result, codec.TaskMetadata(claimed.task_name, queued_at=claimed.queued_at))
        try:
            result.labels = self.formatter.loads(claimed.message).labels
        except Exception as exc:  # noqa: BLE001 - this may be why it could not be executed
            logger.warning("task %s: its message cannot be read: %s", task_id, exc)
        try:
            # If it has a result, a worker has finished it and could not acknowledge it.
            if not await self.result_backend.is_result_ready(task_id):
                await self.result_backend.set_result(task_id, result)
        except Exception:
            # It is claimed again when the lease ends.
            logger.exception("task %s: its error result cannot be stored, retrying", task_id)
            claims.drop([claim])
        else:
            await claims.park([claim])


class _QueueView(SQLAlchemyBroker):
    """A view of a broker, for a worker of other queues; it shares the broker's state."""

    __slots__ = ("_queue_names",)

    def __init__(self, broker: SQLAlchemyBroker, queue_names: tuple[str, ...]) -> None:
        self.__dict__ = vars(broker)
        self._queue_names = queue_names

    @property
    def queue_names(self) -> tuple[str, ...]:
        return self._queue_names

    def __repr__(self) -> str:
        return repr_at("SQLAlchemyBroker", self.settings.table, self.place)
