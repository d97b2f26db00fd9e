"""A pytest plugin: each test gets a PostgreSQL schema, with your broker and its results in it.

It is opt-in: `pytest_plugins = ["taskiq_sa_pg.pytest_plugin"]` in the top-level conftest.py.
The fixtures `broker`, `backend` and `run_tasks` are for tests. Those named `taskiq_sa_pg_...` are
also for your conftest.py, which may override them.

PYTEST_DONT_REWRITE: a conftest.py may import the types of this module before pytest loads it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode
from uuid import uuid4

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from sqlalchemy import URL, Executable, MetaData, NullPool, func, inspect, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateSchema, DropSchema
from taskiq import (
    AsyncBroker,
    InMemoryBroker,
    TaskiqEvents,
    TaskiqMessage,
    TaskiqMiddleware,
    TaskiqResult,
)
from taskiq.receiver import Receiver
from taskiq.utils import maybe_awaitable

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.background import end_task
from taskiq_sa_pg.broker import InProcessBroker, SQLAlchemyBroker
from taskiq_sa_pg.database import Database, make_engine
from taskiq_sa_pg.exceptions import ConfigurationError

try:
    from pytest_asyncio import fixture as asyncio_fixture
except ImportError:  # the tests are run by anyio's plugin
    asyncio_fixture = pytest.fixture  # type: ignore[assignment]  # its decorator has other overloads

__all__ = ["RunTasks"]

AnyMetaData = MetaData | Sequence[MetaData]
_Connect = Callable[[str | URL], "_Server | ConfigurationError"]

_DSN_VARIABLE: Final = "TASKIQ_SA_PG_TEST_DSN"
_DSN_OF_SERVER: Final = f"{_DSN_VARIABLE} (or your fixture taskiq_sa_pg_server_dsn)"
_REMEDIES: Final = (
    "taskiq_sa_pg.pytest_plugin needs a PostgreSQL server. Do one of these:\n"
    f"- set the environment variable {_DSN_VARIABLE} to the DSN of a test database\n"
    '- override the fixture taskiq_sa_pg_server_dsn (scope="session") and return the DSN\n'
    "- install the embedded server: pip install 'taskiq-sa-pg[embedded]' (Linux, macOS)"
)
_NO_LOOP: Final = (
    "the fixture broker needs an event loop: install pytest-asyncio, or mark the test with "
    "pytest.mark.anyio"
)
_LOCK_TIMEOUT: Final = "10s"  # of DROP SCHEMA, which would wait for open transactions for ever


class _Recorder(TaskiqMiddleware):
    """Notes the results that are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, TaskiqResult[Any]]] = []

    def post_save(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        self.results.append((message.task_id, result))


class RunTasks:
    """The value of the fixture `run_tasks`."""

    def __init__(self, broker: AsyncBroker, recorder: _Recorder) -> None:
        self._broker = broker
        self._recorder = recorder

    async def __call__(self, *, delayed: bool = False) -> list[TaskiqResult[Any]]:
        """Runs the tasks that wait in all queues of the broker, and the tasks that they enqueue.

        Tasks run in this process, one after the other. With an InMemoryBroker, whose tasks start
        when they are enqueued, it waits for their end.

        Args:
            delayed: Whether to run delayed tasks too, without waiting. Otherwise they stay queued.

        Returns:
            The results of the tasks that ended since the last call, in that order, as they are
            stored. A failed task is a result with `is_err`.

        Raises:
            ConfigurationError: A queue contains a task that is not registered with the broker.
        """
        if isinstance(self._broker, InMemoryBroker):
            await self._broker.wait_all()
        else:
            await _run_queues(_checked(self._broker), delayed)
        found, self._recorder.results = self._recorder.results, []
        backend = self._broker.result_backend
        if not isinstance(backend, SQLAlchemyResultBackend) or not backend.keep_results:
            return [result for _, result in found]
        stored = await backend.get_results([task_id for task_id, _ in found])
        return [stored.get(task_id, result) for task_id, result in found]

    def sync(self, *, delayed: bool = False) -> list[TaskiqResult[Any]]:
        """The same for tests that are not asynchronous.

        Raises:
            ConfigurationError: The test is asynchronous.
        """
        parts = _parts_of(self._broker)
        if not parts:  # so nothing depends on the event loop of the fixture
            return asyncio.run(self(delayed=delayed))
        loop = parts[0].runtime.loop
        if loop.is_running():
            raise ConfigurationError("in an asynchronous test, use `await run_tasks()`")
        return loop.run_until_complete(self(delayed=delayed))


class _Server:
    """Creates and drops schemas, from fixtures that have no event loop."""

    def __init__(self, dsn: str | URL, portal: BlockingPortal) -> None:
        self.dsn = dsn.render_as_string(hide_password=False) if isinstance(dsn, URL) else dsn
        self.portal = portal
        self._engine = make_engine(self.dsn, _DSN_OF_SERVER, pool_size=1)
        self._schemas: set[str] = set()
        try:
            self.portal.call(self._execute)
        except Exception as exc:
            raise ConfigurationError(f"cannot connect to {_DSN_OF_SERVER}: {exc!r}") from exc

    def create(self) -> str:
        schema = f"taskiq_sa_pg_test_{uuid4().hex}"
        self.portal.call(self._execute, CreateSchema(schema))
        self._schemas.add(schema)
        return schema

    def drop(self, schema: str) -> None:
        limit = select(func.set_config("lock_timeout", _LOCK_TIMEOUT, True))
        try:
            self.portal.call(self._execute, limit, DropSchema(schema, cascade=True))
        except DBAPIError as exc:
            pytest.fail(
                f"the schema {schema} cannot be dropped: {exc.orig}. If a transaction of the test "
                "is still open, close its session before the test ends",
                pytrace=False,
            )
        self._schemas.discard(schema)

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(lambda: self.portal.call(self._engine.dispose))
            for schema in self._schemas.copy():
                stack.callback(self.drop, schema)

    async def _execute(self, *statements: Executable) -> None:
        async with self._engine.begin() as connection:
            for statement in statements:
                await connection.execute(statement)


@pytest.fixture(scope="session")
def taskiq_sa_pg_server_dsn() -> Iterator[str]:
    """DSN of the server: TASKIQ_SA_PG_TEST_DSN, else an embedded server. Override it for yours."""
    if given := os.environ.get(_DSN_VARIABLE):
        yield given
        return
    with ExitStack() as stack:
        try:
            # Here, because it is for POSIX only and most runs need none.
            from taskiq_sa_pg.embedded import postgres  # noqa: PLC0415

            server = stack.enter_context(postgres())
        except (ImportError, RuntimeError, OSError) as exc:
            pytest.fail(f"{_REMEDIES}\n\n{type(exc).__name__}: {exc}", pytrace=False)
        yield server.dsn


@pytest.fixture(scope="session")
def taskiq_sa_pg_metadata() -> AnyMetaData:
    """Tables to create in each schema: none. Override it to return your `Base.metadata`."""
    return ()


@pytest.fixture(scope="session")
def _taskiq_sa_pg_servers(taskiq_sa_pg_server_dsn: object) -> Iterator[_Connect]:
    # The argument makes pytest refuse an override of a smaller scope: connections would outlive it.
    with start_blocking_portal() as portal, ExitStack() as stack:

        @cache  # pytest would keep one server, but each folder or class may override its DSN
        def connect(dsn: str | URL) -> _Server | ConfigurationError:
            try:
                server = _Server(dsn, portal)
            except ConfigurationError as exc:
                return exc
            stack.callback(server.close)
            return server

        yield connect


@pytest.fixture
def taskiq_sa_pg_dsn(
    taskiq_sa_pg_server_dsn: str | URL,
    _taskiq_sa_pg_servers: _Connect,
    taskiq_sa_pg_metadata: AnyMetaData,
) -> Iterator[str]:
    """DSN of a new schema, the search_path of its connections; dropped at the end."""
    server = _taskiq_sa_pg_servers(taskiq_sa_pg_server_dsn)
    if isinstance(server, ConfigurationError):
        raise server
    schema = server.create()
    try:
        dsn = _in_schema(server.dsn, schema)
        if metadata := _listed(taskiq_sa_pg_metadata):
            server.portal.call(_create_tables, dsn, metadata)
        yield dsn
    finally:
        server.drop(schema)


@pytest.fixture
def taskiq_sa_pg_engine(
    taskiq_sa_pg_dsn: str, taskiq_sa_pg_metadata: AnyMetaData, taskiq_sa_pg_broker: AsyncBroker
) -> AsyncEngine:
    """AsyncEngine on the test's schema, for your sessions. It keeps no connection open."""
    metadata = [*_listed(taskiq_sa_pg_metadata), *_metadata_of(taskiq_sa_pg_broker)]
    options = {"schema_translate_map": _translations(metadata)}
    return make_engine(taskiq_sa_pg_dsn, poolclass=NullPool, execution_options=options)


@pytest.fixture
def taskiq_sa_pg_broker(taskiq_sa_pg_dsn: str) -> AsyncBroker:
    """The broker to test: a new SQLAlchemyBroker. Override it to return your application's."""
    dsn, broker = taskiq_sa_pg_dsn, SQLAlchemyBroker(taskiq_sa_pg_dsn)
    results: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(dsn, models=broker.models)
    return broker.with_result_backend(results)


@pytest.fixture
async def _taskiq_sa_pg_started_by_anyio(
    anyio_backend: object, taskiq_sa_pg_broker: AsyncBroker, taskiq_sa_pg_dsn: str
) -> AsyncIterator[AsyncBroker]:
    async with _started(taskiq_sa_pg_broker, taskiq_sa_pg_dsn):
        yield taskiq_sa_pg_broker


@asyncio_fixture
async def _taskiq_sa_pg_started_by_asyncio(
    taskiq_sa_pg_broker: AsyncBroker, taskiq_sa_pg_dsn: str
) -> AsyncIterator[AsyncBroker]:
    async with _started(taskiq_sa_pg_broker, taskiq_sa_pg_dsn):
        yield taskiq_sa_pg_broker


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Any:
    """The fixture taskiq_sa_pg_broker, started on the test's event loop and in its schema."""
    if "anyio_backend" in request.fixturenames:
        return request.getfixturevalue("_taskiq_sa_pg_started_by_anyio")
    plugins = request.config.pluginmanager
    if not any(map(plugins.hasplugin, ("asyncio", "pytest_asyncio.plugin"))):
        pytest.fail(_NO_LOOP, pytrace=False)
    return request.getfixturevalue("_taskiq_sa_pg_started_by_asyncio")


@pytest.fixture
def backend(broker: AsyncBroker) -> SQLAlchemyResultBackend[Any]:
    """The broker's SQLAlchemyResultBackend, started."""
    results = broker.result_backend
    if not isinstance(results, SQLAlchemyResultBackend):
        pytest.fail(
            "the fixture backend needs a broker with a SQLAlchemyResultBackend, and this one has "
            f"a {type(results).__name__}: add .with_result_backend(SQLAlchemyResultBackend(...))",
            pytrace=False,
        )
    return results


@pytest.fixture
def run_tasks(broker: AsyncBroker) -> Iterator[RunTasks]:
    """Runs the tasks that wait in the broker's queues, and returns their results."""
    recorder = _Recorder()
    broker.add_middlewares(recorder)
    yield RunTasks(broker, recorder)
    broker.middlewares.remove(recorder)


async def _run_queues(broker: SQLAlchemyBroker, delayed: bool) -> None:
    receiver = Receiver(broker, max_async_tasks=1, run_startup=False)
    while names := await _waiting(broker, delayed):
        async with aclosing(broker.listening_to(*names).listen()) as messages:
            message = await anext(messages)
            # As in a worker, context variables end with the task.
            running = asyncio.create_task(receiver.callback(message, raise_err=True))
            try:
                # For taskiq, a cancellation is the task's error: it would not end the test.
                await asyncio.shield(running)
            finally:
                await end_task(running)


async def _waiting(broker: SQLAlchemyBroker, delayed: bool) -> set[str]:
    """The names of the queues in which tasks wait.

    Raises:
        ConfigurationError: One of the tasks is not registered.
    """
    if delayed:
        await _end_delays(broker)
    waiting = [count for count in await broker.get_queues() if count.waiting]
    for count in waiting:
        if broker.find_task(count.task_name) is None:
            raise ConfigurationError(
                f'the queue "{count.queue_name}" contains a task "{count.task_name}", which is not '
                "registered with the broker: import the module that defines it"
            )
    return {count.queue_name for count in waiting}


async def _end_delays(broker: SQLAlchemyBroker) -> None:
    queue = broker.settings.queue_table
    is_delayed = queue.c.worker.is_(None) & (queue.c.available_at > func.now())
    statement = update(queue).where(is_delayed).values(available_at=func.now())
    async with broker.runtime.database.engine.begin() as connection:
        await connection.execute(statement)


@asynccontextmanager
async def _started(broker: AsyncBroker, dsn: str) -> AsyncIterator[None]:
    """Starts a broker as a client and as a worker, in the schema of a DSN."""
    in_memory = isinstance(broker, InMemoryBroker)
    if not in_memory:
        _checked(broker)
    are_created = await _create_tables(dsn, _metadata_of(broker))
    changes: dict[str, Any] = {"run_migrations": False}
    if are_created:
        changes["check_schema"] = "off"  # they are those of the models, and to check takes longer
    with ExitStack() as stack:
        for part in _parts_of(broker):
            stack.enter_context(_moved(part, dsn, changes))
        if isinstance(broker, InProcessBroker):
            stack.enter_context(broker.checking(dsn))
        await broker.startup()
        try:
            if not in_memory:
                await _notify(broker, TaskiqEvents.WORKER_STARTUP)
            elif not getattr(broker.result_backend, "is_started", True):
                await broker.result_backend.startup()  # before taskiq 0.13
            yield
        finally:
            if isinstance(broker, InMemoryBroker):
                await broker.wait_all()
            await _notify(broker, TaskiqEvents.WORKER_SHUTDOWN)
            # InMemoryBroker's own would end its threads, which the next tests need.
            await (AsyncBroker.shutdown(broker) if in_memory else broker.shutdown())


@contextmanager
def _moved(part: Any, dsn: str, changes: Mapping[str, Any]) -> Iterator[None]:
    """Has a broker or a result backend use the schema of a DSN instead of its own database."""
    before = part.settings, part.database
    part.settings = replace(part.settings, **changes)
    # Without it, statements run as fast as in production.
    schemas = _translations([part.models.metadata])
    options = {"execution_options": {"schema_translate_map": schemas}} if schemas else {}
    part.database = Database(dsn, engine_kwargs=options)
    try:
        yield
    finally:
        part.settings, part.database = before


async def _notify(broker: AsyncBroker, event: TaskiqEvents) -> None:
    for handler in broker.event_handlers.get(event, []):
        await maybe_awaitable(handler(broker.state))


async def _create_tables(dsn: str, metadata: Sequence[MetaData]) -> bool:
    """Creates the tables that are missing; returns whether all were."""
    engine = make_engine(dsn, poolclass=NullPool)
    schemas = _translations(metadata)
    async with engine.begin() as connection:
        _ = await connection.execution_options(schema_translate_map=schemas)
        found = await connection.run_sync(lambda below: set(inspect(below).get_table_names()))
        were_missing = found.isdisjoint(_names_in(metadata))
        for each in metadata:
            names = _names_in([each])
            if not names <= found:
                is_new = found.isdisjoint(names)
                await connection.run_sync(each.create_all, checkfirst=not is_new)
                found |= names
    return were_missing


def _names_in(metadata: Iterable[MetaData]) -> set[str]:
    return {table.name for each in metadata for table in each.tables.values()}


def _checked(broker: AsyncBroker) -> SQLAlchemyBroker:
    if isinstance(broker, SQLAlchemyBroker):
        return broker
    raise ConfigurationError(
        "the pytest plugin works with a SQLAlchemyBroker or an InMemoryBroker, not with a "
        f"{type(broker).__name__}: have the fixture taskiq_sa_pg_broker return an InMemoryBroker"
    )


def _listed(metadata: AnyMetaData) -> Sequence[MetaData]:
    return [metadata] if isinstance(metadata, MetaData) else metadata


def _metadata_of(broker: AsyncBroker) -> list[MetaData]:
    return [part.models.metadata for part in _parts_of(broker)]


def _parts_of(broker: AsyncBroker) -> list[SQLAlchemyBroker | SQLAlchemyResultBackend[Any]]:
    both = (broker, broker.result_backend)
    return [each for each in both if isinstance(each, SQLAlchemyBroker | SQLAlchemyResultBackend)]


def _translations(metadata: Iterable[MetaData]) -> dict[str, None]:
    """Has tables with a schema of their own found in the test's schema."""
    tables = [table for each in metadata for table in each.tables.values()]
    return {table.schema: None for table in tables if table.schema}


def _in_schema(dsn: str, schema: str) -> str:
    base, _, query = dsn.partition("?")
    parameters = parse_qsl(query, keep_blank_values=True)
    options = [value for name, value in parameters if name == "options"]
    options.append(f"-c search_path={schema}")
    others = [(name, value) for name, value in parameters if name != "options"]
    return f"{base}?{urlencode([*others, ('options', ' '.join(options))], quote_via=quote)}"
