"""The pytest plugin, in projects whose tests another pytest process runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Database

ROOT = Path(__file__).parents[2]

CONFTEST = '''
import asyncio
import os

import asyncpg
import pytest

pytest_plugins = ["taskiq_sa_pg.pytest_plugin"]

NAME = f"plugin_{os.getpid()}"
os.environ["TASKIQ_SA_PG_TEST_DSN"] += f"&application_name={NAME}"
QUERY = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"


async def only_two_connections_are_left(dsn):
    """That of the plugin, which creates schemas, and this one."""
    connection = await asyncpg.connect(dsn)
    while await connection.fetchval(QUERY, NAME) > 2:
        await asyncio.sleep(0.01)
    await connection.close()


@pytest.fixture(autouse=True)
def nothing_is_left(taskiq_sa_pg_server_dsn):
    yield
    asyncio.run(only_two_connections_are_left(taskiq_sa_pg_server_dsn))
'''

TEST_DEFAULTS = """
import asyncio
import contextvars

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from taskiq import InMemoryBroker, SimpleRetryMiddleware

from taskiq_sa_pg import ConfigurationError
from taskiq_sa_pg.pytest_plugin import RunTasks

pytestmark = pytest.mark.asyncio


async def test_what_waits_in_all_queues(broker, backend, run_tasks: RunTasks):
    ran = []

    @broker.task
    async def add_one(number: int) -> int:
        ran.append(number)
        if number < 3:
            await add_one.kiq(number + 1)
        return number + 1

    assert await run_tasks() == []
    task = await add_one.kiq(1)
    mail = await add_one.kicker().with_labels(queue_name="mail").kiq(3)
    assert not await backend.is_result_ready(task.task_id)
    results = await run_tasks()
    assert sorted(ran) == [1, 2, 3, 3]
    assert [result.return_value for result in results] == [number + 1 for number in ran]
    assert (await task.get_result()).return_value == 2
    assert (await backend.wait_result(mail, timeout=0)).return_value == 4
    assert await run_tasks() == []


async def test_results_are_those_that_are_stored(broker, run_tasks):
    number = contextvars.ContextVar("number", default=0)

    @broker.task
    async def fail() -> None:
        number.set(1)
        raise ValueError("no")

    @broker.task
    def return_what_cannot_be_stored() -> object:
        return lambda: None

    await fail.kiq()
    await return_what_cannot_be_stored.kiq()
    failed, unstored = await run_tasks()
    with pytest.raises(ValueError, match="no"):
        failed.raise_for_error()
    assert unstored.is_err
    assert number.get() == 0


async def test_delayed_tasks_and_retries(broker, run_tasks):
    broker.add_middlewares(SimpleRetryMiddleware())
    attempts = []

    @broker.task(retry_on_error=True, max_retries=3, delay=600)
    async def divide() -> int:
        attempts.append(1)
        return 1 // (len(attempts) - 1)

    await divide.kiq()
    assert await run_tasks() == []
    [result] = await run_tasks(delayed=True)
    assert (result.return_value, len(attempts)) == (1, 2)


async def test_a_task_that_hangs_is_cancelled_with_the_test(broker, run_tasks):
    began = asyncio.Event()

    @broker.task
    async def hang() -> None:
        began.set()
        await asyncio.Event().wait()

    await hang.kiq()
    running = asyncio.create_task(run_tasks())
    await began.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    [result] = await run_tasks()
    assert result.is_err


async def test_an_asynchronous_test_awaits(run_tasks):
    with pytest.raises(ConfigurationError, match="use `await run_tasks"):
        run_tasks.sync()


async def test_a_task_that_is_not_registered(broker, run_tasks):
    task = InMemoryBroker().register_task(lambda: None, task_name="elsewhere")
    await task.kicker().with_broker(broker).kiq()
    with pytest.raises(ConfigurationError, match='task "elsewhere", which is not registered'):
        await run_tasks()


@pytest.mark.parametrize("number", range(3))
async def test_every_test_has_a_schema(number, broker, run_tasks, taskiq_sa_pg_engine):
    async with taskiq_sa_pg_engine.connect() as connection:
        schema = await connection.scalar(text("SELECT current_schema"))
        stored = await connection.scalar(text("SELECT count(*) FROM taskiq_results"))
    assert schema.startswith("taskiq_sa_pg_test_")
    assert stored == 0
    task = broker.register_task(lambda: number, task_name="one")
    await task.kicker().with_task_id("always the same").kiq()
    [result] = await run_tasks()
    assert result.return_value == number


@pytest.mark.filterwarnings("ignore:.*is marked with")
def test_without_an_event_loop(broker, run_tasks, taskiq_sa_pg_dsn):
    task = broker.register_task(lambda: 42, task_name="one")
    engine = create_engine(taskiq_sa_pg_dsn.replace("postgresql:", "postgresql+psycopg:"))
    with Session(engine) as session, session.begin():
        broker.in_session(session).kiq_sync(task)
    engine.dispose()
    [result] = run_tasks.sync()
    assert result.return_value == 42
"""

TEST_APPLICATION = """
import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from taskiq import TaskiqEvents

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend, build_models

pytestmark = pytest.mark.asyncio

DSN = "postgresql://nobody@10.0.0.9/production"
MODELS = build_models(schema="jobs", queue=True)
RESULTS = SQLAlchemyResultBackend(DSN, models=MODELS, connect_args={"ssl": "require"})
BROKER = SQLAlchemyBroker(DSN, models=MODELS).with_result_backend(RESULTS)

sessions = async_sessionmaker()


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


@BROKER.on_event(TaskiqEvents.WORKER_STARTUP)
async def set_up(state):
    state.unit = "boxes"


@BROKER.task
async def pack(order_id: int) -> str:
    async with sessions() as session:
        order = await session.get_one(Order, order_id)
    return f"{order.id} {BROKER.state.unit}"


async def place_order(order_id: int) -> None:
    async with sessions() as session:
        session.add(Order(id=order_id))
        await BROKER.in_session(session).kiq(pack, order_id)
        if order_id <= 0:
            raise ValueError(order_id)
        await session.commit()


@pytest.fixture(scope="session")
def taskiq_sa_pg_metadata():
    return Base.metadata


@pytest.fixture(scope="module")
def taskiq_sa_pg_broker():
    before = BROKER.settings, BROKER.database, RESULTS.settings, RESULTS.database
    yield BROKER
    assert (BROKER.settings, BROKER.database, RESULTS.settings, RESULTS.database) == before
    assert BROKER.middlewares == []
    assert not RESULTS.is_started


@pytest.fixture(autouse=True)
def sessions_of_the_test(taskiq_sa_pg_engine):
    sessions.configure(bind=taskiq_sa_pg_engine)


@pytest.mark.parametrize("attempt", range(2))
async def test_an_order_is_packed(attempt, run_tasks):
    await place_order(7)
    [result] = await run_tasks()
    assert result.return_value == "7 boxes"


async def test_without_an_order_nothing_is_packed(run_tasks):
    with pytest.raises(ValueError):
        await place_order(0)
    assert await run_tasks() == []
"""

TEST_IN_MEMORY = """
import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from taskiq import InMemoryBroker

from taskiq_sa_pg import ConfigurationError, SQLAlchemyResultBackend
from taskiq_sa_pg.testing import InProcessBroker

pytestmark = pytest.mark.asyncio

ENGINE = create_async_engine("postgresql+asyncpg://nobody@10.0.0.9/production")
RESULTS = SQLAlchemyResultBackend(engine=ENGINE, keep_results=False)
BROKER = InMemoryBroker().with_result_backend(RESULTS)


@BROKER.task
def add_one(number: int) -> int:
    return number + 1


@pytest.fixture
def taskiq_sa_pg_broker():
    return BROKER


@pytest.mark.parametrize("attempt", range(2))
async def test_in_memory(attempt, backend, run_tasks):
    task = await add_one.kiq(41)
    [result] = await run_tasks()
    assert result.return_value == 42
    assert (await backend.get_result(task.task_id)).return_value == 42


IN_PROCESS = InProcessBroker("postgresql://nobody@10.0.0.9/production")
_ = IN_PROCESS.with_result_backend(RESULTS)


@IN_PROCESS.task
async def double(number: int) -> int:
    return number * 2


def send(broker, dsn):
    engine = create_engine(dsn.replace("postgresql:", "postgresql+psycopg:"))
    with Session(engine) as session, session.begin():
        broker.in_session(session).kiq_sync(double, 21)
    engine.dispose()


class TestInProcess:
    @pytest.fixture
    def taskiq_sa_pg_broker(self):
        yield IN_PROCESS
        with pytest.raises(ConfigurationError, match="in another database"):
            IN_PROCESS.in_session(Session(create_engine("postgresql+psycopg://nobody@x/y")))

    async def test_in_a_session(self, run_tasks, taskiq_sa_pg_engine):
        async with AsyncSession(taskiq_sa_pg_engine) as session:
            await IN_PROCESS.in_session(session).kiq(double, 21)
            await session.commit()
        [result] = await run_tasks()
        assert result.return_value == 42

    @pytest.mark.filterwarnings("ignore:.*is marked with")
    def test_without_an_event_loop(self, run_tasks, taskiq_sa_pg_dsn):
        send(IN_PROCESS, taskiq_sa_pg_dsn)
        [result] = run_tasks.sync()
        assert result.return_value == 42


class TestWithoutABackend:
    @pytest.fixture
    def taskiq_sa_pg_broker(self):
        broker = InProcessBroker()
        broker.register_task(double.original_func, task_name=double.task_name)
        return broker

    @pytest.mark.filterwarnings("ignore:.*is marked with")
    def test_without_an_event_loop(self, broker, run_tasks, taskiq_sa_pg_dsn):
        send(broker, taskiq_sa_pg_dsn)
        [result] = run_tasks.sync()
        assert result.return_value == 42
"""

TEST_CLOSED = """
import pytest


@pytest.fixture(scope="session")
def taskiq_sa_pg_server_dsn():
    return "postgresql://127.0.0.1:1/closed"


def test_closed(taskiq_sa_pg_dsn): ...
"""

TEST_INVALID = """
import pytest


@pytest.fixture(scope="session")
def taskiq_sa_pg_server_dsn():
    return "nonsense"


def test_invalid(taskiq_sa_pg_dsn): ...


class TestScope:
    @pytest.fixture
    def taskiq_sa_pg_server_dsn(self):
        return "postgresql://127.0.0.1:1/closed"

    def test_scope(self, taskiq_sa_pg_dsn): ...
"""

ANYIO_CONFTEST = """
import pytest

pytest_plugins = ["taskiq_sa_pg.pytest_plugin"]


@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

TEST_ANYIO = """
import psycopg
import pytest
from sqlalchemy import make_url


def identity_of(dsn):
    url = make_url(dsn).render_as_string(hide_password=False).replace("+", "%20")
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT system_identifier FROM pg_control_system()").fetchone()


def test_a_folder_has_its_server(taskiq_sa_pg_server_dsn, taskiq_sa_pg_dsn):
    assert identity_of(taskiq_sa_pg_dsn) == identity_of(taskiq_sa_pg_server_dsn)


@pytest.mark.anyio
async def test_with_anyio(broker, run_tasks):
    @broker.task
    async def add_one(number: int) -> int:
        return number + 1

    await add_one.kiq(41)
    [result] = await run_tasks()
    assert result.return_value == 42
"""

# A folder may have a server of its own.
OTHER_CONFTEST = """
import os

import pytest
from sqlalchemy import make_url


@pytest.fixture(scope="session")
def taskiq_sa_pg_server_dsn():
    return make_url(os.environ["OTHER_DSN"])
"""

TEST_MISTAKES = """
import psycopg
import pytest
from taskiq import AsyncBroker, InMemoryBroker

from taskiq_sa_pg import pytest_plugin

pytest_plugin._LOCK_TIMEOUT = "10ms"

LEFT_OPEN = []


class OtherBroker(AsyncBroker):
    async def kick(self, message): ...
    def listen(self): ...


class TestOtherBroker:
    @pytest.fixture
    def taskiq_sa_pg_broker(self):
        return OtherBroker()

    @pytest.mark.anyio
    async def test_another_broker(self, broker): ...


class TestOtherBackend:
    @pytest.fixture
    def taskiq_sa_pg_broker(self):
        return InMemoryBroker()

    @pytest.mark.anyio
    async def test_another_backend(self, backend): ...


class TestMigrations:
    @pytest.fixture
    def taskiq_sa_pg_dsn(self, taskiq_sa_pg_dsn):
        with psycopg.connect(taskiq_sa_pg_dsn) as connection:
            connection.execute("CREATE TABLE taskiq_results (task_id int)")
        return taskiq_sa_pg_dsn

    @pytest.mark.anyio
    async def test_tables_that_do_not_match(self, broker): ...


def test_no_event_loop(broker): ...


def test_an_open_transaction(taskiq_sa_pg_dsn):
    connection = psycopg.connect(taskiq_sa_pg_dsn)
    connection.execute("CREATE TABLE mine ()")
    connection.commit()
    connection.execute("SELECT FROM mine")
    LEFT_OPEN.append(connection)


def test_the_transaction_ends():
    LEFT_OPEN.pop().close()
"""


def run_pytest(directory: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """The exit status and the output of a pytest process in a directory."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-Werror", *arguments],
        cwd=directory,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def write(directory: Path, **files: str) -> None:
    for name, source in files.items():
        (directory / f"{name}.py").write_text(source)


async def schemas(database: Database) -> list[str]:
    query = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'taskiq_sa_pg_test_%'"
    return [row["nspname"] for row in await database.fetch(query)]


async def test_with_pytest_asyncio(database: Database, tmp_path: Path) -> None:
    write(
        tmp_path,
        conftest=CONFTEST,
        test_defaults=TEST_DEFAULTS,
        test_application=TEST_APPLICATION,
        test_in_memory=TEST_IN_MEMORY,
    )
    options = ("asyncio_mode=strict", "asyncio_default_fixture_loop_scope=function")
    status, output = run_pytest(
        tmp_path, *(f"-o{each}" for each in options), TASKIQ_SA_PG_TEST_DSN=database.direct_dsn
    )
    assert status == pytest.ExitCode.OK, output
    assert await schemas(database) == []


async def test_with_anyio_an_embedded_server_and_the_users_own(
    database: Database, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write(tmp_path, conftest=ANYIO_CONFTEST, test_anyio=TEST_ANYIO)
    write(other, conftest=OTHER_CONFTEST, test_other=TEST_ANYIO, test_mistakes=TEST_MISTAKES)
    status, output = run_pytest(
        tmp_path, "-pno:asyncio", TASKIQ_SA_PG_TEST_DSN="", OTHER_DSN=database.direct_dsn
    )
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "6 passed, 5 errors in" in output, output
    for part in (
        "not with a OtherBroker: have the fixture taskiq_sa_pg_broker return an InMemoryBroker",
        "this one has a InmemoryResultBackend: add .with_result_backend(",
        "needs an event loop: install pytest-asyncio, or mark the test with pytest.mark.anyio",
        "SchemaError: ",
        "cannot be dropped: ",
        "is still open, close its session before the test ends",
    ):
        assert part in output, output
    assert await schemas(database) == []


def test_the_guide_lists_the_fixtures() -> None:
    page = (ROOT / "docs/how-to/testing.md").read_text("utf-8")
    source = (ROOT / "taskiq_sa_pg/pytest_plugin.py").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    defined = re.findall(r"^@pytest\.fixture.*\ndef ([a-z]\w+)", source, re.MULTILINE)
    assert sorted(listed) == sorted(defined)
    assert len(listed) > 5


def test_without_a_server(tmp_path: Path) -> None:
    write(
        tmp_path,
        conftest='pytest_plugins = ["taskiq_sa_pg.pytest_plugin"]\n',
        test_none="def test_none(taskiq_sa_pg_dsn): ...\n",
        test_closed=TEST_CLOSED,
        test_invalid=TEST_INVALID,
    )
    status, output = run_pytest(
        tmp_path, "-pno:asyncio", TASKIQ_SA_PG_TEST_DSN="", TASKIQ_SA_PG_POSTGRES_BIN=str(tmp_path)
    )
    assert status == pytest.ExitCode.TESTS_FAILED
    for remedy in (
        "set the environment variable TASKIQ_SA_PG_TEST_DSN",
        "override the fixture taskiq_sa_pg_server_dsn",
        "pip install 'taskiq-sa-pg[embedded]'",
        "(or your fixture taskiq_sa_pg_server_dsn): ConnectionRefusedError",
        "ScopeMismatch: ",
        "TASKIQ_SA_PG_TEST_DSN (or your fixture taskiq_sa_pg_server_dsn) cannot be parsed",
    ):
        assert remedy in output, output
