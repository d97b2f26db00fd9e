"""Tasks that are sent in the transaction of an AsyncSession."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session
from taskiq import SendTaskError

from taskiq_sa_pg import ConfigurationError, InvalidTaskIdError, build_models
from tests.conftest import eventually
from tests.integration.shops import MODELS, Base, Order, Shop, labelled, packing


async def test_the_order_and_its_task_are_committed_together(each_shop: Shop) -> None:
    broker = await each_shop.start_broker()
    pack = packing(broker)
    async with AsyncSession(each_shop.engine()) as session:
        session.add(Order(id=1))
        task = await broker.in_session(session).kiq(pack, 1)
        assert await each_shop.queued() == await each_shop.orders() == []
        await session.commit()
    assert await each_shop.queued() == [task.task_id]
    assert await each_shop.orders() == [1]
    [(message,)] = await each_shop.database.fetch("SELECT message FROM shop_queue")
    assert broker.formatter.loads(message).args == [1]


async def test_what_is_rolled_back_was_never_sent(each_shop: Shop) -> None:
    broker = each_shop.broker()
    pack = packing(broker)
    async with AsyncSession(each_shop.engine()) as session:
        session.add(Order(id=1))
        await broker.in_session(session).kiq(pack, 1)
        await session.rollback()
        await broker.in_session(session).kiq(pack, 2)
    assert await each_shop.queued() == await each_shop.orders() == []


async def test_a_savepoint_takes_its_tasks_with_it(each_shop: Shop) -> None:
    broker = each_shop.broker()
    pack = packing(broker)
    async with AsyncSession(each_shop.engine()) as session, session.begin():
        in_session = broker.in_session(session)
        first = await in_session.kiq(pack, 1)
        savepoint = await session.begin_nested()
        await in_session.kiq(pack, 2)
        await savepoint.rollback()
        async with session.begin_nested():
            third = await in_session.kiq(pack, 3)
    assert set(await each_shop.queued()) == {first.task_id, third.task_id}


async def test_a_failed_session_can_go_on_from_its_savepoint(each_shop: Shop) -> None:
    broker = each_shop.broker()
    pack = packing(broker)
    async with AsyncSession(each_shop.engine()) as session, session.begin():
        first = await broker.in_session(session).kiq(pack, 1)
        savepoint = await session.begin_nested()
        await broker.in_session(session).kiq(pack, 2)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1/0"))
        await savepoint.rollback()
    assert await each_shop.queued() == [first.task_id]


@pytest.mark.parametrize("way", ["autobegin", "begin", "autobegin=False", "maker.begin"])
async def test_ways_to_begin_a_transaction(way: str, shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    sessions = async_sessionmaker(shop.engine(), autobegin=way != "autobegin=False")
    if way == "maker.begin":
        async with sessions.begin() as session:
            tasks = [await broker.in_session(session).kiq(pack, number) for number in range(3)]
    else:
        async with sessions() as session:
            if way != "autobegin":
                await session.begin()
            tasks = [await broker.in_session(session).kiq(pack, number) for number in range(3)]
            await session.commit()
    assert set(await shop.queued()) == {task.task_id for task in tasks}


async def test_two_phases(each_shop: Shop) -> None:
    broker = await each_shop.start_broker()
    pack = packing(broker)
    async with (
        each_shop.listening(broker) as told,
        AsyncSession(each_shop.engine(), twophase=True) as session,
    ):
        await broker.in_session(session).kiq(pack, 1)
        await session.run_sync(Session.prepare)
        assert await each_shop.queued() == []
        await session.rollback()
        task = await broker.in_session(session).kiq(pack, 2)
        await session.run_sync(Session.prepare)
        await session.commit()
        assert await each_shop.queued() == [task.task_id]
    assert told.names == ["default"]


async def test_an_outer_transaction_decides(each_shop: Shop) -> None:
    broker = await each_shop.start_broker()
    pack = packing(broker)
    async with each_shop.engine().connect() as connection:
        async with each_shop.listening(broker) as told:
            outer = await connection.begin()
            await _send_on(connection, broker.in_session, pack)
            await outer.rollback()
            async with connection.begin():
                task_id = await _send_on(connection, broker.in_session, pack)
        assert task_id in await each_shop.queued()
        assert told.names == []  # a worker looks for itself
        async with each_shop.listening(broker) as told:
            await _send_on(connection, broker.in_session, pack)
        assert told.names == ["default"]
    assert len(await each_shop.queued()) == 4  # with two that listening() has sent


async def _send_on(connection: AsyncConnection, in_session: Any, pack: Any) -> str:
    mode: Any = "create_savepoint"
    async with AsyncSession(connection, join_transaction_mode=mode) as session:
        task = await in_session(session).kiq(pack, 1)
        await session.commit()
    task_id: str = task.task_id
    return task_id


async def test_a_scoped_session_is_the_one_of_its_scope(shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    scoped = async_scoped_session(async_sessionmaker(shop.engine()), lambda: 0)
    scoped.add(Order(id=1))
    task = await broker.in_session(scoped).kiq(pack, 1)
    await scoped.commit()
    await scoped.remove()
    assert (await shop.queued(), await shop.orders()) == ([task.task_id], [1])


async def test_a_session_has_an_engine_for_each_model(shop: Shop) -> None:
    """The queue's is taken, be it the only one."""
    broker = shop.broker()
    pack = packing(broker)
    binds = {Base: shop.engine(), MODELS.Queue: shop.engine()}
    async with AsyncSession(binds=binds) as session:
        task = await broker.in_session(session).kiq(pack, 1)
        await session.commit()
    assert await shop.queued() == [task.task_id]
    async with AsyncSession(binds={Base: shop.engine()}) as session:
        with pytest.raises(ConfigurationError, match="no engine for shop_queue: create it with"):
            broker.in_session(session)


async def test_a_schema_translate_map_leads_to_the_table(shop: Shop) -> None:
    models = build_models("shop", schema="the shop", queue=True)
    broker = shop.broker(models=models)
    pack = packing(broker)
    engine = shop.engine().execution_options(
        schema_translate_map={"the shop": shop.database.schema}
    )
    async with AsyncSession(engine) as session:
        task = await broker.in_session(session).kiq(pack, 1)
        await session.commit()
    assert await shop.queued() == [task.task_id]


async def test_below_an_async_session_is_a_session(each_shop: Shop) -> None:
    broker = each_shop.broker()
    pack = packing(broker)
    async with AsyncSession(each_shop.engine()) as session:
        task = await session.run_sync(lambda below: broker.in_session(below).kiq_sync(pack, 1))
        await session.commit()
    assert await each_shop.queued() == [task.task_id]


async def test_a_kicker_brings_its_labels_and_task_id_and_stays_as_it_was(shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    kicker = labelled(pack, queue_name="mail", priority=7, delay=60).with_task_id("own")
    async with AsyncSession(shop.engine()) as session:
        task = await broker.in_session(session).kiq(kicker, 1)
        again = await broker.in_session(session).kiq(kicker, 2)
        own = labelled(pack, priority=2).with_broker(broker.in_session(session))
        other = await own.kiq(3)
        await session.commit()
    assert kicker.broker is broker
    assert task.task_id == again.task_id == "own"
    rows = await shop.database.fetch(
        "SELECT task_id, queue_name, priority, available_at - queued_at >= interval '60 s', message"
        " FROM shop_queue ORDER BY priority DESC"
    )
    assert [tuple(row)[:4] for row in rows] == [
        ("own", "mail", 7, True),
        (other.task_id, "default", 2, False),
    ]
    assert broker.formatter.loads(rows[0]["message"]).args == [1]  # one that waits stays


async def test_workers_are_told_after_the_commit_by_the_broker(each_shop: Shop) -> None:
    broker = await each_shop.start_broker()
    pack = packing(broker)
    async with AsyncSession(each_shop.engine()) as session:
        async with each_shop.listening(broker) as told:
            in_session = broker.in_session(session)
            await in_session.kiq(labelled(pack, queue_name="rolled back"), 1)
            await session.rollback()
            await in_session.kiq(labelled(pack, queue_name="closed"), 1)
            await session.close()
            async with session.begin():
                await in_session.kiq(pack, 1)
                savepoint = await session.begin_nested()
                await in_session.kiq(labelled(pack, queue_name="savepoint"), 1)
                async with session.begin_nested():
                    await in_session.kiq(labelled(pack, queue_name="in it"), 1)
                await savepoint.rollback()
        assert told.names == ["default"]
        async with each_shop.listening(broker) as told, session.begin():
            async with session.begin_nested():
                await in_session.kiq(labelled(pack, queue_name="released"), 1)
            async with each_shop.listening(broker) as meanwhile:
                pass
            assert meanwhile.names == []
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
        assert told.names == ["released"]
        assert pid not in told.pids


async def test_a_session_is_told_of_once_however_often_it_is_used(shop: Shop) -> None:
    broker = await shop.start_broker()
    pack = packing(broker)
    async with shop.listening(broker) as told, AsyncSession(shop.engine()) as session:
        for number in range(3):
            await broker.in_session(session).kiq(pack, number)
            await session.commit()
            session.info.clear()
            await session.commit()
    assert set(told.names) == {"default"}
    assert len(await shop.queued()) == 4  # with one that listening() has sent


async def test_a_worker_begins_at_once(each_shop: Shop) -> None:
    """It is woken by the notification: it looks by itself after 5 seconds only."""
    broker, sender = await each_shop.start_broker(), await each_shop.start_broker()
    pack = packing(sender)
    packing(broker)
    async with aclosing(broker.listen()) as listening:
        waiting = asyncio.ensure_future(anext(listening))

        async def is_listening() -> bool:
            runtime = broker.runtime
            return runtime.listener is not None and runtime.listener.is_healthy

        await eventually(is_listening)
        async with AsyncSession(each_shop.engine()) as session:
            task = await sender.in_session(session).kiq(pack, 1)
            await session.commit()
        message = await asyncio.wait_for(waiting, 4)
        assert broker.formatter.loads(message.data).task_id == task.task_id


async def test_a_cancelled_caller_has_sent_nothing(each_shop: Shop) -> None:
    broker = each_shop.broker()
    pack = packing(broker)
    kicker = pack.kicker().with_task_id("one")
    engine = each_shop.engine()
    async with AsyncSession(engine) as first, AsyncSession(engine) as session:
        await broker.in_session(first).kiq(kicker, 1)
        sending = asyncio.ensure_future(broker.in_session(session).kiq(kicker, 2))
        query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"

        async def is_blocked() -> bool:
            return bool(await each_shop.database.fetch(query))

        await eventually(is_blocked)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await session.rollback()
        await first.rollback()
        task = await broker.in_session(session).kiq(pack, 3)
        await session.commit()
    assert await each_shop.queued() == [task.task_id]


@pytest.mark.parametrize(
    ("labels", "task_id", "error"),
    [
        ({"priority": 11}, None, ConfigurationError),
        ({"delay": "soon"}, None, ConfigurationError),
        ({"queue_name": ""}, None, ConfigurationError),
        ({}, "a\x00b", InvalidTaskIdError),
    ],
)
async def test_what_is_refused_leaves_the_session_as_it_was(
    labels: dict[str, Any], task_id: str | None, error: type[Exception], shop: Shop
) -> None:
    broker = shop.broker()
    pack = packing(broker)
    kicker = labelled(pack, **labels).with_task_id(task_id)
    async with AsyncSession(shop.engine()) as session:
        session.add(Order(id=1))
        with pytest.raises(SendTaskError) as caught:
            await broker.in_session(session).kiq(kicker, 1)
        assert isinstance(caught.value.__cause__, error)
        await session.commit()
    assert (await shop.queued(), await shop.orders()) == ([], [1])


Refused = dict[str, tuple[Callable[[AsyncEngine], Any], str]]
REFUSED: Refused = {
    "no session": (lambda engine: engine, "a Session or an AsyncSession, not AsyncEngine"),
    "the class": (lambda _: AsyncSession, "a Session or an AsyncSession, not AsyncSession"),
    "unbound": (lambda _: AsyncSession(), "no engine for shop_queue: create it with"),
    "not begun": (
        lambda engine: AsyncSession(engine, autobegin=False),
        "no transaction: call begin\\(\\)",
    ),
    "AUTOCOMMIT": (
        lambda engine: AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")),
        "is in AUTOCOMMIT, .* use the task's own kiq",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_sessions_that_cannot_send(name: str, shop: Shop) -> None:
    """in_session() says so itself: kiq() would wrap it in a SendTaskError."""
    make, reason = REFUSED[name]
    with pytest.raises(ConfigurationError, match=reason):
        shop.broker().in_session(make(shop.engine()))


async def test_autocommit_is_found_wherever_it_was_said(shop: Shop) -> None:
    broker = shop.broker()
    engine_wide = shop.engine(isolation_level="AUTOCOMMIT")
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        broker.in_session(AsyncSession(engine_wide))
    async with AsyncSession(shop.engine()) as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            broker.in_session(session)
    async with AsyncSession(engine_wide) as session:
        level = {"isolation_level": "SERIALIZABLE"}
        await session.connection(execution_options=level)
        await broker.in_session(session).kiq(packing(broker), 1)
        await session.rollback()
    assert await shop.queued() == []


async def test_a_closed_session_is_refused(shop: Shop) -> None:
    broker = shop.broker()
    session = AsyncSession(shop.engine(), close_resets_only=False)
    await session.connection()
    await session.close()
    with pytest.raises(ConfigurationError, match="the session is closed: send the task before"):
        broker.in_session(session)


async def test_each_kind_of_session_has_its_own_method(shop: Shop) -> None:
    broker = shop.broker()
    pack = packing(broker)
    async with AsyncSession(shop.engine()) as session:
        with pytest.raises(ConfigurationError, match="with an AsyncSession, use kiq\\(\\)"):
            broker.in_session(session).kiq_sync(pack, 1)
        with pytest.raises(ConfigurationError, match="use kiq_sync\\(\\)"):
            await broker.in_session(session.sync_session).kiq(pack, 1)
        with pytest.raises(ConfigurationError, match="listens to the broker itself"):
            broker.in_session(session).listen()


async def test_a_connection_of_the_application(shop: Shop) -> None:
    """A session on a connection without a transaction commits for itself."""
    broker = shop.broker()
    pack = packing(broker)
    async with shop.engine().connect() as connection, AsyncSession(connection) as session:
        task = await broker.in_session(session).kiq(pack, 1)
        await session.commit()
    assert await shop.queued() == [task.task_id]
