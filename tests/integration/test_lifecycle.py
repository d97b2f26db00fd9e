"""Owned engines from startup to shutdown, on one event loop and on several; and what errors say."""

import asyncio
import gc
import inspect
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from sqlalchemy import NullPool
from taskiq import AsyncBroker, BrokerMessage
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg import (
    ConfigurationError,
    NotStartedError,
    SchemaError,
    SQLAlchemyResultBackend,
    StorageError,
)
from taskiq_sa_pg.database import DEFAULT_MAX_CONNECTIONS
from taskiq_sa_pg.results import pruner, reader, search, status, writer
from taskiq_sa_pg.timings import Timings
from tests.conftest import BackendFactory, Database, engine_of, eventually
from tests.integration.databases import assert_disconnected
from tests.tasks import result_of

Backend = SQLAlchemyResultBackend[Any]

DRIVERS = ["asyncpg", "psycopg"]


@pytest.fixture(params=DRIVERS)
def dsn(request: pytest.FixtureRequest, database: Database) -> str:
    """An address whose sessions are called `owned`."""
    dsn = database.dsn_of(request.param)
    return f"{dsn}&application_name=owned"


async def use(backend: Backend) -> None:
    """Opens as many connections as may be open: calls of one kind share statements."""
    calls: list[Awaitable[Any]] = [
        call
        for i in range(10)
        for call in (
            backend.set_result(f"a{i}", result_of(i)),
            backend.set_progress(f"a{i}", TaskProgress(state="s", meta=None)),
            backend.is_result_ready(f"unknown {i}"),
            backend.get_results([f"unknown {i}"]),
            backend.get_progress(f"unknown {i}"),
        )
    ]
    await asyncio.gather(*calls)
    assert await backend.is_result_ready("a0")


async def background_is_quiet() -> bool:
    """Whether no task runs but this one."""
    return asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_owned_engine_is_disposed_at_shutdown(dsn: str, database: Database) -> None:
    backend = Backend(dsn, run_migrations=True)
    await backend.startup()
    await use(backend)
    assert len(await database.sessions("owned")) == DEFAULT_MAX_CONNECTIONS
    await backend.shutdown()
    await assert_disconnected(database, "owned")
    with pytest.raises(NotStartedError, match="not started"):
        await backend.is_result_ready("a0")


async def test_startup_and_shutdown_may_be_repeated(dsn: str, database: Database) -> None:
    backend = Backend(dsn, run_migrations=True)
    for _ in range(2):
        await backend.startup()
        engine = engine_of(backend)
        await backend.startup()
        assert engine_of(backend) is engine
        await use(backend)
        await backend.shutdown()
        await backend.shutdown()
        await assert_disconnected(database, "owned")


async def test_no_statement_is_built_before_it_is_needed(
    start_backend: BackendFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def counted(name: str, build: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            built.append(name)
            return build(*args, **kwargs)

        return note

    for module in (pruner, reader, search, status, writer):
        for name, function in list(vars(module).items()):
            if inspect.isfunction(function) and "statements." in function.__module__:
                monkeypatch.setattr(module, name, counted(name, function))
    backend = await start_backend(track="started", prune_interval=3600)
    assert built == []
    for _ in range(2):
        await backend.set_result("a", result_of(1))
        assert built == ["upsert_results"]
    await backend.get_result("a")
    assert built == ["upsert_results", "select_results"]


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("shuts_down", [True, False])
def test_a_backend_may_start_again_on_another_event_loop(
    dsn: str, database: Database, shuts_down: bool
) -> None:
    backend = Backend(dsn, run_migrations=True)

    async def run() -> None:
        await backend.startup()
        await use(backend)
        if shuts_down:
            await backend.shutdown()

    for _ in range(2):
        asyncio.run(run())
        # Where nobody shut down, the connections were closed with the loop.
        asyncio.run(assert_disconnected(database, "owned"))
    asyncio.run(backend.shutdown())
    gc.collect()  # what was left open would warn


def test_shutdown_may_run_on_another_event_loop(dsn: str, database: Database) -> None:
    backend = Backend(dsn, run_migrations=True)
    asyncio.run(backend.startup())
    asyncio.run(backend.shutdown())
    asyncio.run(assert_disconnected(database, "owned"))


# Nothing closes what such a loop leaves but the garbage collector, which warns.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("shuts_down", [True, False])
def test_a_loop_that_is_closed_without_ceremony_does_no_harm(
    dsn: str, database: Database, shuts_down: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Backend(dsn, run_migrations=True)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(backend.startup())
    loop.run_until_complete(use(backend))
    # For a task that it cannot finish any more, asyncio itself would complain.
    loop.run_until_complete(eventually(background_is_quiet))
    loop.close()
    if shuts_down:
        asyncio.run(backend.shutdown())

    async def again() -> None:
        await backend.startup()
        await use(backend)
        await backend.shutdown()

    asyncio.run(again())
    gc.collect()
    asyncio.run(assert_disconnected(database, "owned"))
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_backend_that_is_forgotten_closes_its_connections(
    dsn: str, database: Database
) -> None:
    backend = Backend(dsn, run_migrations=True)
    await backend.startup()
    await use(backend)
    del backend
    await assert_disconnected(database, "owned", collects=True)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_callable_dsn_is_asked_for_every_new_connection(
    driver: str, start_backend: BackendFactory, database: Database
) -> None:
    asked = 0

    def ask() -> str:
        nonlocal asked
        asked += 1
        dsn = database.dsn_of(driver)
        return f"{dsn}&application_name=rotating{asked}"

    names: list[str] = []

    def note(dbapi_connection: Any, _record: Any) -> None:
        connection = dbapi_connection.driver_connection
        if driver == "asyncpg":
            names.append(connection.get_settings().application_name)
        else:
            names.append(connection.info.parameter_status("application_name"))

    # Each statement takes a connection from the pool, which makes a new one each time.
    backend = await start_backend(
        ask,
        notify=False,
        pool_events=[(note, "connect")],
        pool_recycle=0,
        timings=Timings(keep_connection=0),
    )
    for task_id in "abc":
        await backend.set_result(task_id, result_of(1))
    await backend.shutdown()
    # The first answer chose the driver.
    assert names == [f"rotating{i}" for i in range(2, asked + 1)]
    assert len(names) >= 4


class Vault:
    """A callable DSN that fails as often as it is told to."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.failures = 0

    def __call__(self) -> str:
        if self.failures:
            self.failures -= 1
            raise LookupError("the vault is sealed")
        return self.dsn


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_callable_dsn_that_fails_for_a_moment_is_asked_again(
    driver: str, start_backend: BackendFactory, database: Database
) -> None:
    vault = Vault(database.dsn_of(driver))
    vault.failures = 2
    # Each statement opens a connection.
    nothing_kept = Timings(keep_connection=0)
    backend = await start_backend(vault, poolclass=NullPool, notify=False, timings=nothing_kept)
    vault.failures = 2
    await backend.set_result("task", result_of(1))
    assert backend.stats().retries == 2
    assert (await backend.get_result("task")).return_value == 1


async def test_a_callable_dsn_that_goes_on_failing_is_an_error_that_says_so(
    start_backend: BackendFactory, database: Database
) -> None:
    vault = Vault(database.dsn)
    said = "the dsn callable failed: LookupError: the vault is sealed"
    vault.failures = 1
    with pytest.raises(StorageError, match=said):
        await start_backend(vault, startup_timeout=0)
    nothing_kept = Timings(keep_connection=0)
    backend = await start_backend(
        vault,
        poolclass=NullPool,
        retry_timeout=0,
        prune_interval=0.01,
        result_ttl=1,
        timings=nothing_kept,
    )
    vault.failures = 10**9
    with pytest.raises(StorageError, match=f"'task'.*{said}"):
        await backend.set_result("task", result_of(1))
    # What runs in the background takes no harm.
    pruner = backend.runtime.pruner
    assert pruner.is_running
    vault.failures = 0
    await backend.set_result("task", result_of(1))
    assert pruner.is_running


class Broker(AsyncBroker):
    """One that carries nothing. taskiq 0.12's InMemoryBroker starts no result backend."""

    async def kick(self, message: BrokerMessage) -> None: ...

    async def listen(self) -> AsyncGenerator[bytes, None]:
        yield b""


async def test_two_brokers_may_share_a_backend(dsn: str, database: Database) -> None:
    """The last of them ends it; further calls of shutdown() do nothing."""
    backend = Backend(dsn, run_migrations=True)
    brokers = [Broker().with_result_backend(backend) for _ in range(2)]
    for broker in brokers:
        await broker.startup()
    waiting = asyncio.create_task(backend.wait_result("task"))
    await brokers[0].shutdown()
    await backend.set_result("task", result_of(1))
    assert (await waiting).return_value == 1
    await brokers[1].shutdown()
    await assert_disconnected(database, "owned")
    with pytest.raises(NotStartedError):
        await backend.is_result_ready("task")
    await brokers[0].shutdown()
    await backend.startup()
    await backend.shutdown()
    await assert_disconnected(database, "owned")


async def test_the_server_s_own_time_limit_is_a_reason_to_try_again(
    start_backend: BackendFactory, database: Database
) -> None:
    """A whole batch would be lost with it."""
    dsn = database.dsn + quote(" -c statement_timeout=200ms")
    backend = await start_backend(dsn)
    connection = await asyncpg.connect(database.direct_dsn)
    async with connection.transaction():
        await connection.execute("LOCK TABLE taskiq_results")
        storing = [
            asyncio.create_task(backend.set_result(f"task {i}", result_of(i))) for i in range(20)
        ]

        async def is_repeated() -> bool:
            return backend.stats().retries > 0

        await eventually(is_repeated)
    await asyncio.gather(*storing)
    await connection.close()
    assert len(await backend.get_results([f"task {i}" for i in range(20)])) == 20


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_statement_that_was_prepared_before_a_migration_is_prepared_again(
    driver: str, start_backend: BackendFactory, database: Database
) -> None:
    backend = await start_backend(database.dsn_of(driver), max_connections=1)
    await backend.set_result("task", result_of(1))
    for _ in range(7):  # psycopg prepares what it has seen five times
        await backend.get_result("task")
    await database.fetch("ALTER TABLE taskiq_results ALTER log TYPE VARCHAR(500)")
    assert (await backend.get_result("task")).return_value == 1
    assert backend.stats().retries <= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("postgres@/postgres", "postgres:hunter2@/nowhere"), "nowhere"),
        (("postgres@/postgres", "nobody:hunter2@/postgres"), "nobody"),
        (("?host=", "?port=1&host="), "connection"),
        (("host=/", "host=/no/such/directory/"), "No such file"),
    ],
    ids=lambda change: change[1] if isinstance(change, tuple) else "",
)
async def test_a_startup_that_fails_leaves_nothing_open_and_may_be_repeated(
    dsn: str, database: Database, change: tuple[str, str], said: str
) -> None:
    good = dsn
    bad = dsn.replace(*change)
    current = [bad]
    backend = Backend(lambda: current[0], run_migrations=True, startup_timeout=0)
    for _ in range(2):
        with pytest.raises((StorageError, SchemaError), match=said) as caught:
            await backend.startup()
        assert "hunter2" not in str(caught.value)
        with pytest.raises(NotStartedError):
            await backend.is_result_ready("a")
    await assert_disconnected(database, "owned")
    current[0] = good
    await backend.startup()
    await use(backend)
    await backend.shutdown()


async def test_a_startup_without_tables_leaves_nothing_open(dsn: str, database: Database) -> None:
    backend = Backend(dsn)
    with pytest.raises(SchemaError, match="taskiq_results"):
        await backend.startup()
    await assert_disconnected(database, "owned")


async def test_engine_arguments_that_do_not_exist_are_refused_before_anything_connects(
    database: Database,
) -> None:
    with pytest.raises(ConfigurationError, match="no_such_argument"):
        Backend(database.dsn, no_such_argument=1)
    # Which driver a callable asks for is not known before.
    backend = Backend(lambda: database.dsn, no_such_argument=1)
    with pytest.raises(ConfigurationError, match="no_such_argument"):
        await backend.startup()


SECRET = "a secret that is not for logs"


async def all_calls(backend: Backend) -> dict[str, str]:
    """What each method says about a task, with its SQLSTATE before it."""
    said = {}
    for name, call in {
        "store its result": backend.set_result("task-7", result_of(SECRET)),
        "look for results": backend.is_result_ready("task-7"),
        "read results": backend.get_result("task-7"),
        "store its progress": backend.set_progress(
            "task-7", TaskProgress(state="running", meta=SECRET)
        ),
        "read its progress": backend.get_progress("task-7"),
    }.items():
        with pytest.raises(StorageError) as caught:
            await call
        said[name] = f"{caught.value.sqlstate} {caught.value}"
        assert caught.value.__cause__ is not None
        for text in (str(caught.value), str(caught.value.__cause__)):
            assert SECRET not in text
    return said


@pytest.mark.parametrize("driver", DRIVERS)
async def test_without_its_tables_every_call_says_what_to_do(
    driver: str, database: Database, start_backend: BackendFactory
) -> None:
    dsn = database.dsn_of(driver)
    backend: Backend = await start_backend(dsn)
    await backend.set_result("task-7", result_of(1))
    await database.fetch("DROP TABLE taskiq_results, taskiq_results_progress")
    for name, said in (await all_calls(backend)).items():
        assert said.startswith(f"42P01 task 'task-7': cannot {name} in table taskiq_results")
        assert "does not exist (42P01)" in said
        assert "alembic upgrade head" in said
        assert "\n" not in said


@pytest.fixture
async def role(database: Database) -> AsyncIterator[str]:
    """A role that may see the schema and no table."""
    name = f"role_{uuid.uuid4().hex}"
    await database.fetch(f"CREATE ROLE {name}")
    await database.fetch(f"GRANT USAGE ON SCHEMA {database.schema} TO {name}")
    yield name
    await database.fetch(f"DROP OWNED BY {name}")
    await database.fetch(f"DROP ROLE {name}")


@pytest.mark.parametrize("driver", DRIVERS)
async def test_without_permission_every_call_says_what_to_grant(
    driver: str, database: Database, role: str, start_backend: BackendFactory
) -> None:
    await start_backend(database.dsn)
    dsn = database.dsn_of(driver) + quote(f" -c role={role}")
    unchecked = {"run_migrations": False, "check_schema": "off"}
    backend: Backend = await start_backend(dsn, **unchecked)
    for name, said in (await all_calls(backend)).items():
        assert said.startswith(f"42501 task 'task-7': cannot {name} in table taskiq_results")
        assert "grant the role SELECT, INSERT, UPDATE and DELETE" in said
    taking: Backend = await start_backend(dsn, keep_results=False, **unchecked)
    with pytest.raises(StorageError, match=r"task 't': cannot take results from table .*42501"):
        await taking.get_result("t")
    await database.fetch(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {database.schema} TO {role}"
    )
    await use(backend)
    assert (await taking.get_result("a0")).return_value == 0


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_row_that_does_not_fit_is_an_error_of_its_call_alone(
    driver: str, database: Database, start_backend: BackendFactory
) -> None:
    dsn = database.dsn_of(driver)
    backend: Backend = await start_backend(dsn)
    await database.fetch("ALTER TABLE taskiq_results ADD CHECK (task_id <> 'unwanted')")
    with pytest.raises(StorageError, match="violates check constraint") as caught:
        await backend.set_result("unwanted", result_of(SECRET))
    assert caught.value.sqlstate == "23514"
    assert SECRET not in str(caught.value)
    await use(backend)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_pool_without_a_free_connection_is_a_storage_error(
    driver: str, database: Database, start_backend: BackendFactory
) -> None:
    dsn = database.dsn_of(driver)
    await start_backend(dsn)
    # Without a look at the tables, whose connection would be kept for the next statement.
    backend: Backend = await start_backend(
        dsn,
        pool_size=1,
        pool_timeout=0.05,
        run_migrations=False,
        check_schema="off",
        retry_timeout=0,
    )
    async with engine_of(backend).connect():
        with pytest.raises(
            StorageError, match=r"'task-7'.*all 1 connections of your engine's pool"
        ) as caught:
            await backend.is_result_ready("task-7")
    assert caught.value.sqlstate is None
    assert await backend.is_result_ready("task-7") is False
