"""Tasks that are sent in the transaction of a Session, without an event loop."""

import asyncio
from collections.abc import Callable
from threading import get_ident
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from taskiq import SendTaskError, TaskiqMessage, TaskiqMiddleware, TaskiqResult

from taskiq_sa_pg import (
    ConfigurationError,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
    TaskStatus,
)
from tests.integration.shops import MODELS, Order, Shop, packing

DRIVERS = pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])


@DRIVERS
async def test_the_order_and_its_task_are_committed_together(driver: str, shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    with Session(shop.sync_engine(driver)) as session:
        session.add(Order(id=1))
        tasks = [broker.in_session(session).kiq_sync(pack, 1) for _ in range(3)]
        assert await shop.queued() == await shop.orders() == []
        session.commit()
        session.add(Order(id=2))
        broker.in_session(session).kiq_sync(pack, 2)
        session.rollback()
        broker.in_session(session).kiq_sync(pack, 3)
    assert set(await shop.queued()) == {task.task_id for task in tasks}
    assert await shop.orders() == [1]
    messages = await shop.database.fetch("SELECT message FROM shop_queue")
    assert [broker.formatter.loads(row[0]).args for row in messages] == [[1]] * 3


@DRIVERS
async def test_savepoints_and_two_phases(driver: str, shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    with Session(shop.sync_engine(driver), twophase=True) as session:
        in_session = broker.in_session(session)
        first = in_session.kiq_sync(pack, 1)
        savepoint = session.begin_nested()
        in_session.kiq_sync(pack, 2)
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1/0"))
        savepoint.rollback()
        with session.begin_nested():
            third = in_session.kiq_sync(pack, 3)
        session.prepare()
        assert await shop.queued() == []
        session.commit()
    assert set(await shop.queued()) == {first.task_id, third.task_id}


@DRIVERS
async def test_a_thread_sends_without_an_event_loop(driver: str, shop: Shop) -> None:
    """The broker tells on its own loop, and keeps to its own connection."""
    broker = await shop.start_broker()
    pack = packing(broker)
    sessions = scoped_session(sessionmaker(shop.sync_engine(driver)))

    def order() -> tuple[str, Any]:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        task = broker.in_session(sessions).kiq_sync(pack.kicker().with_labels(priority=3), 1)
        pid = sessions.scalar(text("SELECT pg_backend_pid()"))
        sessions.commit()
        sessions.remove()
        return task.task_id, pid

    async with shop.listening(broker) as told:
        task_id, pid = await asyncio.to_thread(order)
    assert task_id in await shop.queued()
    assert told.names == ["default"]
    assert pid not in told.pids


async def test_a_broker_whose_loop_has_ended_tells_nobody(shop: Shop) -> None:
    """Nor does one that was never started; the tasks are sent all the same."""
    broker = shop.broker()
    pack = packing(broker)
    await asyncio.to_thread(asyncio.run, broker.startup())
    with Session(shop.sync_engine("psycopg")) as session:
        task = broker.in_session(session).kiq_sync(pack, 1)
        session.commit()
    assert await shop.queued() == [task.task_id]
    await broker.shutdown()


async def test_a_kicker_with_the_broker_of_a_session(shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    with sessionmaker(shop.sync_engine("psycopg")).begin() as session:
        kicker = pack.kicker().with_task_id("own").with_broker(broker.in_session(session))
        await kicker.kiq(1)
    assert await shop.queued() == ["own"]


Refused = dict[str, tuple[Callable[[Engine], Any], str]]
REFUSED: Refused = {
    "another database": (
        lambda engine: Session(
            create_engine(engine.url.set(host="10.0.0.9", query={}, database="other"))
        ),
        "the session is connected to .*, but table shop_queue of the broker is .* Use the same",
    ),
    "another name": (
        lambda engine: Session(create_engine(engine.url.set(database="other"))),
        "but table shop_queue of the broker is in another database",
    ),
    "another dialect": (
        lambda _: Session(create_engine("sqlite://")),
        "the session is connected to sqlite://, but table shop_queue of the broker is in another",
    ),
    "AUTOCOMMIT": (
        lambda engine: Session(engine.execution_options(isolation_level="autocommit")),
        "is in AUTOCOMMIT",
    ),
    "closed": (
        lambda engine: _closed(Session(engine, close_resets_only=False)),
        "the session is closed",
    ),
    "unbound": (lambda _: Session(), "no engine for shop_queue"),
    "not begun": (lambda engine: Session(engine, autobegin=False), "no transaction"),
}


def _closed(session: Session) -> Session:
    session.connection()
    session.close()
    return session


@pytest.mark.parametrize("name", REFUSED)
async def test_sessions_that_cannot_send(name: str, shop: Shop) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ConfigurationError, match=reason):
        shop.broker().in_session(make(shop.sync_engine("psycopg2")))


async def test_the_address_of_another_database_shows_no_password(shop: Shop) -> None:
    engine = create_engine("postgresql+psycopg://me:secret@10.0.0.9/other")
    with pytest.raises(ConfigurationError) as caught:
        shop.broker().in_session(Session(engine))
    assert "secret" not in str(caught.value)


async def test_an_engine_whose_url_tells_nothing_is_taken(shop: Shop) -> None:
    """One that gets its connections from a function of the application's."""
    other = shop.sync_engine("psycopg")
    engine = create_engine("postgresql+psycopg://", creator=lambda: _connected(other))
    broker = shop.broker("postgresql://10.0.0.9/elsewhere")
    with Session(engine) as session:
        task = broker.in_session(session).kiq_sync(packing(broker), 1)
        session.commit()
    assert await shop.queued() == [task.task_id]
    engine.dispose()


def _connected(engine: Engine) -> Any:
    connection = engine.raw_connection()
    connection.detach()
    return connection.dbapi_connection


class Noting(TaskiqMiddleware):
    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        self.noted.append(f"pre {get_ident()}")
        message.labels["noted"] = "yes"
        return message

    def post_send(self, message: TaskiqMessage) -> None:
        self.noted.append(f"post {get_ident()}")


class Awaited(TaskiqMiddleware):
    async def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        message.labels["awaited"] = "yes"
        return message


class AwaitedAfter(TaskiqMiddleware):
    async def post_send(self, message: TaskiqMessage) -> None: ...


class Both(Awaited):
    def pre_send_in_session(self, message: TaskiqMessage) -> TaskiqMessage:
        message.labels["in_session"] = "yes"
        return message


class Hidden(TaskiqMiddleware):
    def pre_send(self, message: TaskiqMessage) -> Any:
        return asyncio.sleep(0, message)


async def test_middlewares_of_a_sync_session(shop: Shop) -> None:
    noting = Noting()
    broker = shop.broker().with_middlewares(noting, Both())
    pack = packing(broker)
    with sessionmaker(shop.sync_engine("psycopg")).begin() as session:
        broker.in_session(session).kiq_sync(pack, 1)
    assert noting.noted == [f"pre {get_ident()}", f"post {get_ident()}"]
    [(message,)] = await shop.database.fetch("SELECT message FROM shop_queue")
    labels = broker.formatter.loads(message).labels
    assert (labels["noted"], labels["in_session"], labels.get("awaited")) == ("yes", "yes", None)


@pytest.mark.parametrize(
    ("middleware", "reason"),
    [
        (Awaited(), r"cannot await Awaited.pre_send\(\): make it a synchronous method"),
        (AwaitedAfter(), r"cannot await AwaitedAfter.post_send\(\): make it a synchronous method$"),
        (Hidden(), "does not support a middleware that awaits"),
    ],
)
async def test_what_can_only_be_awaited_is_refused_by_name(
    middleware: TaskiqMiddleware, reason: str, shop: Shop
) -> None:
    broker = shop.broker().with_middlewares(middleware)
    pack = packing(broker)
    with (
        sessionmaker(shop.sync_engine("psycopg")).begin() as session,
        pytest.raises(ConfigurationError, match=reason),
    ):
        broker.in_session(session).kiq_sync(pack, 1)
    assert await shop.queued() == []


async def test_what_is_refused_leaves_the_session_as_it_was(shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    with Session(shop.sync_engine("psycopg2")) as session:
        session.add(Order(id=1))
        with pytest.raises(SendTaskError) as caught:
            broker.in_session(session).kiq_sync(pack.kicker().with_labels(delay=-1), 1)
        assert isinstance(caught.value.__cause__, ConfigurationError)
        session.commit()
    assert await shop.orders() == [1]


async def test_the_status_of_a_task_is_that_of_its_transaction(shop: Shop) -> None:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        shop.dsn("postgresql"), models=MODELS, track="started", check_schema="off"
    )
    broker = shop.broker().with_result_backend(backend)
    await shop.start(broker.with_middlewares(TaskMetadataMiddleware()))
    pack = packing(broker)
    with Session(shop.sync_engine("psycopg")) as session:
        task = broker.in_session(session).kiq_sync(pack, 1)
        gone = broker.in_session(session).kiq_sync(pack, 1)
        assert await backend.get_status(task.task_id) == TaskStatus(task.task_id, "unknown")
        session.rollback()
        task = broker.in_session(session).kiq_sync(pack, 1)
        session.commit()
    assert await backend.get_status(gone.task_id) == TaskStatus(gone.task_id, "unknown")
    assert await shop.database.fetch("SELECT * FROM shop_status") == []
    status = await backend.get_status(task.task_id)
    assert (status.state, status.task_name, status.attempt) == ("queued", "pack", 0)
    [(message, queued_at)] = await shop.database.fetch("SELECT message, queued_at FROM shop_queue")
    assert status.queued_at == queued_at
    assert "taskiq_sa_pg_queued_at" in broker.formatter.loads(message).labels
    result: TaskiqResult[Any] = TaskiqResult(is_err=False, return_value=1, execution_time=1)
    await backend.set_result(task.task_id, result)
    assert (await backend.get_status(task.task_id)).state == "succeeded"
