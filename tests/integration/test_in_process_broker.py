"""The broker for tests of applications: tasks run in the process, after their commit."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from taskiq import SendTaskError, TaskiqDepends
from taskiq.exceptions import UnknownTaskError

from taskiq_sa_pg import ConfigurationError, InvalidTaskIdError, SQLAlchemyResultBackend
from taskiq_sa_pg.testing import InProcessBroker
from tests.integration.shops import MODELS, Order, Shop, packing


@dataclass
class Ran:
    """What the tasks of a broker have seen when they ran."""

    broker: InProcessBroker
    orders: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        async def pack(order: int) -> str:
            for _ in range(20):  # so that nobody sees it done by chance
                await asyncio.sleep(0)
            self.orders.append(order)
            return f"packed {order}"

        self.pack = self.broker.register_task(pack, "pack")


def ran(**kwargs: Any) -> Ran:
    return Ran(InProcessBroker(**kwargs))


@pytest.mark.parametrize("await_inplace", [False, True])
async def test_a_task_runs_after_the_commit(await_inplace: bool, each_shop: Shop) -> None:
    seen: list[list[int]] = []
    broker = InProcessBroker(await_inplace=await_inplace)

    @broker.task(task_name="look")
    async def look() -> None:
        seen.append(await each_shop.orders())

    # With one connection, which is free again when the task runs.
    async with AsyncSession(each_shop.engine(pool_size=1, max_overflow=0)) as session:
        session.add(Order(id=1))
        task = await broker.in_session(session).kiq(look)
        await broker.wait_all()
        assert seen == []
        await session.commit()
        assert len(seen) == await_inplace
        await broker.wait_all()
    assert seen == [[1]]
    assert (await task.get_result()).is_err is False
    await broker.shutdown()


async def test_what_is_rolled_back_never_runs(shop: Shop) -> None:
    tasks = ran()
    broker, pack = tasks.broker, tasks.pack
    async with AsyncSession(shop.engine()) as session:
        in_session = broker.in_session(session)
        await in_session.kiq(pack, 1)
        await session.rollback()
        await in_session.kiq(pack, 2)
        await session.close()
        async with session.begin():
            await in_session.kiq(pack, 3)
            savepoint = await session.begin_nested()
            await in_session.kiq(pack, 4)
            async with session.begin_nested():
                await in_session.kiq(pack, 5)
            await savepoint.rollback()
            async with session.begin_nested():
                await in_session.kiq(pack, 6)
            await broker.wait_all()
            assert tasks.orders == []
        await session.commit()
    await broker.wait_all()
    assert sorted(tasks.orders) == [3, 6]


async def test_the_transaction_of_a_test_itself(shop: Shop) -> None:
    """The session's own commit counts, on a connection that the test rolls back."""
    tasks = ran(await_inplace=True)
    async with shop.engine().connect() as connection:
        outer = await connection.begin()
        session = AsyncSession(connection, join_transaction_mode="create_savepoint")
        await tasks.broker.in_session(session).kiq(tasks.pack, 1)
        await session.rollback()
        await tasks.broker.in_session(session).kiq(tasks.pack, 2)
        await session.commit()
        await session.close()
        await outer.rollback()
    assert tasks.orders == [2]


@pytest.mark.parametrize("await_inplace", [False, True])
async def test_sync_sessions_of_threads_and_of_the_loop(await_inplace: bool, shop: Shop) -> None:
    tasks = ran(await_inplace=await_inplace)
    broker = tasks.broker
    await broker.startup()
    sessions = sessionmaker(shop.sync_engine("psycopg"))

    def order(number: int) -> list[int]:
        with sessions() as session:
            broker.in_session(session).kiq_sync(tasks.pack, number)
            session.commit()
            seen = list(tasks.orders)
            broker.in_session(session).kiq_sync(tasks.pack, -number)
            session.rollback()
        return seen

    seen = await asyncio.to_thread(order, 1)
    assert seen == [1] or not await_inplace
    await broker.wait_all()
    order(2)
    await broker.wait_all()
    async with AsyncSession(shop.engine()) as session:
        await session.run_sync(lambda below: broker.in_session(below).kiq_sync(tasks.pack, 3))
        await session.commit()
    await broker.wait_all()
    assert tasks.orders == [1, 2, 3]


@pytest.mark.parametrize("await_inplace", [False, True])
async def test_a_test_without_an_event_loop(await_inplace: bool, shop: Shop) -> None:
    tasks = ran(await_inplace=await_inplace)
    engine = shop.sync_engine("psycopg2")

    def test() -> None:
        with Session(engine) as session:
            tasks.broker.in_session(session).kiq_sync(tasks.pack, 1)
            assert tasks.orders == []
            session.commit()
        assert tasks.orders == ([1] if await_inplace else [])
        asyncio.run(tasks.broker.wait_all())

    await asyncio.to_thread(test)
    assert tasks.orders == [1]


@pytest.mark.parametrize("await_inplace", [False, True])
async def test_a_task_id_runs_once_in_a_transaction(await_inplace: bool, shop: Shop) -> None:
    """The first of them, as in the queue."""
    tasks = ran(await_inplace=await_inplace)
    async with AsyncSession(shop.engine()) as session, session.begin():
        for number in range(3):
            kicker = tasks.pack.kicker().with_task_id("one" if number else "other")
            await tasks.broker.in_session(session).kiq(kicker, number)
    await tasks.broker.wait_all()
    assert tasks.orders == [0, 1]


async def test_wait_all_waits_for_what_tasks_send(shop: Shop) -> None:
    tasks = ran()
    broker = tasks.broker
    sessions = sessionmaker(shop.sync_engine("psycopg"))

    @broker.task(task_name="both")
    async def both(in_process: InProcessBroker = TaskiqDepends(lambda: broker)) -> None:
        await tasks.pack.kiq(1)
        with sessions.begin() as session:
            in_process.in_session(session).kiq_sync(tasks.pack, 2)

    await both.kiq()
    await broker.wait_all()
    assert sorted(tasks.orders) == [1, 2]


async def test_results_of_the_database(shop: Shop) -> None:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        shop.dsn("postgresql"), models=MODELS, check_schema="off"
    )
    await backend.startup()
    tasks = Ran(InProcessBroker().with_result_backend(backend))
    async with AsyncSession(shop.engine()) as session:
        task = await tasks.broker.in_session(session).kiq(tasks.pack, 1)
        await session.commit()
    result = await backend.wait_result(task, timeout=10)
    assert result.return_value == "packed 1"
    await tasks.broker.wait_all()
    await backend.shutdown()


async def test_what_a_queue_would_refuse_is_refused(shop: Shop) -> None:
    tasks = ran(field_for_task_id="Uuid")
    broker, pack = tasks.broker, tasks.pack
    for kicker, error in [
        (pack.kicker().with_labels(priority=10), ConfigurationError),
        (pack.kicker().with_task_id("no uuid"), InvalidTaskIdError),
    ]:
        with pytest.raises(SendTaskError) as caught:
            await kicker.kiq(1)
        assert isinstance(caught.value.__cause__, error)
    with pytest.raises(ConfigurationError, match="needs the name of a queue"):
        broker.listening_to()
    assert broker.listening_to("mail") is broker
    elsewhere = packing(InProcessBroker())
    elsewhere.task_name = "unknown"
    async with AsyncSession(shop.engine()) as session:
        for kiq in (elsewhere.kicker().with_broker(broker).kiq(1), _in(broker, session, elsewhere)):
            with pytest.raises(SendTaskError) as caught:
                await kiq
            assert isinstance(caught.value.__cause__, UnknownTaskError)
        await session.commit()
    await broker.wait_all()
    assert tasks.orders == []


async def _in(broker: InProcessBroker, session: AsyncSession, task: Any) -> None:
    await broker.in_session(session).kiq(task, 1)


async def test_sessions_that_cannot_send(shop: Shop) -> None:
    broker = InProcessBroker()
    engine = shop.engine()
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    for session, reason in [
        (AsyncSession(), "no engine"),
        (AsyncSession(autocommit), "AUTOCOMMIT"),
        (AsyncSession(engine, autobegin=False), "no transaction"),
    ]:
        with pytest.raises(ConfigurationError, match=reason):
            broker.in_session(session)
    broker.in_session(AsyncSession(engine))
    for at_home in (InProcessBroker(shop.dsn("postgresql")), InProcessBroker(engine=engine)):
        at_home.in_session(AsyncSession(engine))
    with pytest.raises(
        ConfigurationError, match=r"but table .+_queue of the broker is in another database"
    ):
        InProcessBroker("postgresql://10.0.0.9/elsewhere").in_session(AsyncSession(engine))
