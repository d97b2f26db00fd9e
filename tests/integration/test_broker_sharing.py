"""What broker and result backend share, who ends it, and what is left when that fails."""

import asyncio
from typing import Any

import pytest
from taskiq import InMemoryBroker, TaskiqEvents, TaskiqMessage, TaskiqMiddleware, TaskiqState
from taskiq.brokers.inmemory_broker import InmemoryResultBackend

from taskiq_sa_pg import NotStartedError, SQLAlchemyBroker, SQLAlchemyResultBackend
from tests.conftest import Database, assert_nothing_checked_out, eventually
from tests.integration.brokers import (
    PATIENT,
    SOON,
    UNPOLLED,
    Brokers,
    acknowledge,
    hungry,
    id_of,
    is_started,
    listening,
    make_tables,
    models_of,
    send,
    take,
    until_healthy,
    working,
)
from tests.integration.conftest import StartBroker
from tests.integration.databases import assert_disconnected
from tests.tasks import new_id, result_of


def backend_of(broker: SQLAlchemyBroker) -> SQLAlchemyResultBackend[Any]:
    backend = broker.result_backend
    assert isinstance(backend, SQLAlchemyResultBackend)
    return backend


def new_backend(brokers: Brokers, **kwargs: Any) -> SQLAlchemyResultBackend[Any]:
    arguments = {"dsn": brokers.dsn(), "models": models_of(), "check_schema": "off"}
    if brokers.database.is_deaf:
        arguments["listen_dsn"] = brokers.direct_dsn()
    return SQLAlchemyResultBackend(**{**arguments, **kwargs})


async def until_listening(brokers: Brokers, connections: int) -> None:
    async def are_listening() -> bool:
        return len(await brokers.listening()) == connections

    await eventually(are_listening)


async def test_who_listens_and_waits_has_one_pool_and_one_listening_connection(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    broker = await start_broker(results=True, max_connections=2)
    backend = backend_of(broker)
    assert broker.runtime.database is backend.runtime.database
    waiting = asyncio.create_task(backend.wait_result(new_id()))
    async with hungry(broker):
        await until_healthy(broker)
        await asyncio.gather(*[send(broker, queue_name="other") for _ in range(50)])
        assert len(await each_pair.listening()) == 1
        pool = backend.runtime.database.engine.pool
        assert await each_pair.sessions() <= 1 + pool.size()  # type: ignore[attr-defined]
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_both_hear_on_their_common_connection(start_broker: StartBroker) -> None:
    """From whichever began to listen."""
    broker = await start_broker(results=True, timings=UNPOLLED)

    @broker.task(task_name="add")
    async def add(one: int, other: int) -> int:
        return one + other

    async with working(broker):
        for number in range(3):
            task = await add.kiq(number, 1)
            async with asyncio.timeout(SOON):
                result = await backend_of(broker).wait_result(task.task_id)
            assert result.return_value == number + 1


@pytest.mark.parametrize(
    "difference",
    [{"pool_size": 3}, {"dsn": "another"}, {"engine": "another"}, {"listen_dsn": "another"}],
    ids=lambda each: next(iter(each)),
)
async def test_who_leads_elsewhere_has_connections_of_its_own(
    difference: dict[str, Any], brokers: Brokers
) -> None:
    if "dsn" in difference:
        difference = {"dsn": f"{brokers.dsn()}&command_timeout=50"}
    if "listen_dsn" in difference:  # which the backend's would make nothing of
        difference = {"listen_dsn": f"{brokers.direct_dsn()}&command_timeout=50"}
    if "engine" in difference:
        backend = new_backend(brokers, dsn=None, engine=brokers.engine())
        difference = {"engine": brokers.engine()}
    else:
        backend = new_backend(brokers)
    broker = await brokers.start(results=backend, **difference)
    assert broker.runtime.database is not backend.runtime.database
    assert broker.runtime.listener is not backend.runtime.listener
    await send(broker)
    await backend.set_result(new_id(), result_of(1))
    await broker.shutdown()
    assert not backend.is_started


async def test_the_same_borrowed_engine_is_shared(brokers: Brokers) -> None:
    engine = brokers.engine()
    broker = await brokers.start(
        engine=engine, results=new_backend(brokers, dsn=None, engine=engine)
    )
    assert broker.runtime.database is backend_of(broker).runtime.database
    await broker.shutdown()
    async with engine.connect():
        pass  # it is never disposed


async def test_startup_and_shutdown_may_be_repeated(start_broker: StartBroker) -> None:
    """The last shutdown of as many ends both."""
    broker = await start_broker(results=True)
    await broker.startup()
    await broker.shutdown()
    await send(broker)
    await backend_of(broker).set_result(new_id(), result_of(1))
    await broker.shutdown()
    assert not is_started(broker)
    assert not backend_of(broker).is_started
    await broker.shutdown()
    await broker.startup()
    await send(broker)
    await broker.shutdown()
    assert not backend_of(broker).is_started


async def test_two_startups_at_once_are_two(brokers: Brokers) -> None:
    # Which takes a while: it looks at its tables.
    backend = new_backend(brokers, check_schema="warn")
    broker = brokers.make(results=backend)
    await asyncio.gather(broker.startup(), broker.listening_to("mail").startup())
    async with hungry(broker):
        await until_listening(brokers, 1)
    await broker.shutdown()
    await send(broker)
    await broker.shutdown()
    assert not is_started(broker)
    assert not backend_of(broker).is_started


async def test_a_startup_waits_for_a_shutdown(start_broker: StartBroker) -> None:
    """Else it would take over connections that are just being closed."""
    broker = await start_broker(results=True)
    await send(broker)
    ending = asyncio.create_task(broker.shutdown())
    await asyncio.sleep(0)
    await broker.startup()
    await ending
    await send(broker)
    await backend_of(broker).set_result(new_id(), result_of(1))


async def test_the_backend_goes_on_for_its_other_users(brokers: Brokers) -> None:
    """And so does the broker, when those end."""
    backend = new_backend(brokers)
    broker = await brokers.start(results=backend, timings=UNPOLLED)
    await backend.startup()
    await broker.shutdown()
    await backend.set_result("a", result_of(1))
    await broker.startup()
    async with hungry(broker) as coming:
        await until_healthy(broker)
        await backend.shutdown()
        await send(broker)
        async with asyncio.timeout(SOON):
            await acknowledge(await coming)
    await broker.shutdown()
    assert not backend.is_started


async def test_two_brokers_of_one_table_share_a_backend(brokers: Brokers) -> None:
    """Each hears of its own queue, and ends for itself."""
    backend = new_backend(brokers)
    mail = await brokers.start(results=backend, queue_name="mail", timings=UNPOLLED)
    orders = await brokers.start(results=backend, queue_name="orders", timings=UNPOLLED)
    async with hungry(mail) as first, hungry(orders) as second:
        await until_healthy(mail)
        await until_listening(brokers, 1)
        for broker, coming in ((mail, first), (orders, second)):
            task_id = await send(broker)
            async with asyncio.timeout(SOON):
                message = await coming
            assert id_of(broker, message) == task_id
            await acknowledge(message)
    await mail.shutdown()
    async with hungry(orders) as coming:
        await send(orders)
        async with asyncio.timeout(SOON):
            await acknowledge(await coming)


@pytest.mark.parametrize("who", ["broker", "backend"])
async def test_each_may_do_without_notifications(who: str, brokers: Brokers) -> None:
    """The other one has them, and ends its connection."""
    backend = new_backend(brokers, notify=who != "backend")
    broker = await brokers.start(results=backend, notify=who != "broker")
    assert broker.runtime.database is backend.runtime.database
    assert (broker.runtime.listener is None) == (who == "broker")
    async with hungry(broker):
        if who == "backend":
            await until_healthy(broker)
    await broker.shutdown()
    await assert_disconnected(brokers.database, brokers.name)


async def test_another_kind_of_result_backend_is_started_and_ended_with_it(
    start_broker: StartBroker,
) -> None:
    class Counting(InmemoryResultBackend[Any]):
        started = 0

        async def startup(self) -> None:
            self.started += 1

        async def shutdown(self) -> None:
            self.started -= 1

    backend = Counting()
    broker = await start_broker(results=backend, timings=UNPOLLED)
    assert backend.started == 1

    @broker.task(task_name="double")
    async def double(number: int) -> int:
        return 2 * number

    async with working(broker):
        task = await double.kiq(21)
        result = await task.wait_result(check_interval=0.01, timeout=SOON)
    assert result.return_value == 42
    await broker.shutdown()
    assert backend.started == 0


async def test_a_failed_startup_leaves_nothing_open(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """Whichever part of it fails."""
    broker = each_pair.make(results=True)
    backend = backend_of(broker)
    is_broken, engine = True, None

    async def break_down(_: TaskiqState) -> None:
        nonlocal engine
        engine = broker.runtime.database.engine
        await send(broker)  # so that a connection is open
        if is_broken:
            raise ZeroDivisionError

    broker.add_event_handler(TaskiqEvents.CLIENT_STARTUP, break_down)
    with pytest.raises(ZeroDivisionError):
        await broker.startup()
    assert not is_started(broker)
    assert not backend.is_started
    assert engine is not None
    assert_nothing_checked_out(engine)
    if each_pair.owner == "owned":
        await assert_disconnected(each_pair.database, each_pair.name)
    is_broken = False
    await broker.startup()
    await send(broker)
    await broker.shutdown()
    assert not backend.is_started


def test_it_can_be_started_again_on_another_event_loop(new_database: Any, server_dsn: str) -> None:
    """With and without a shutdown on the one before, as tests of applications do."""
    database: Database = new_database()
    asyncio.run(database.create())
    asyncio.run(make_tables(database, "VarChar"))
    brokers = Brokers(database)
    broker = brokers.make(results=True, timings=UNPOLLED)
    sent = []

    async def use(*, is_last: bool) -> None:
        await broker.startup()
        async with hungry(broker) as coming:
            await until_healthy(broker)
            sent.append(await send(broker))
            async with asyncio.timeout(SOON):
                message = await coming
            assert id_of(broker, message) == sent[-1]
            await acknowledge(message)
        if is_last:
            await brokers.close()
            await database.drop()

    asyncio.run(use(is_last=False))
    asyncio.run(use(is_last=False))
    asyncio.run(use(is_last=True))
    assert len(sent) == 3


class Note(TaskiqMiddleware):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        self.sent.append(message.task_id)
        return message


async def test_a_view_shares_everything_but_its_queues(
    start_broker: StartBroker, each_pair: Brokers
) -> None:
    """What is set later, too, and by either."""
    broker = each_pair.make(timings=PATIENT)
    view = broker.listening_to("mail", "sms")
    backend = InmemoryResultBackend[Any]()
    broker.with_result_backend(backend)
    note = Note()
    view.add_middlewares(note)
    view.register_task(lambda: None, task_name="later")
    assert view.result_backend is backend
    assert broker.middlewares == [note]
    assert broker.find_task("later") is view.find_task("later") is not None
    view.is_worker_process = True
    assert broker.is_worker_process
    await view.startup()
    assert is_started(broker)
    assert broker.runtime is view.runtime
    sent = [await send(broker, queue_name=name) for name in ("mail", "orders", "sms")]
    sent.append(await send(view))
    assert note.sent == sent
    async with listening(view) as messages, listening(broker) as others:
        taken = await take(messages, 2)
        assert {id_of(view, each) for each in taken} == {sent[0], sent[2]}
        [other] = await take(others)
        assert id_of(broker, other) == sent[3]
        await acknowledge(*taken, other)
        rest = await each_pair.rows()
        assert [row["queue_name"] for row in rest] == ["orders"]
    await view.shutdown()
    assert not is_started(broker)


async def test_a_broker_that_listens_needs_to_be_started(brokers: Brokers) -> None:
    broker = brokers.make()
    with pytest.raises(NotStartedError, match=r"await broker\.startup\(\)"):
        await anext(broker.listen())


def test_taskiqs_own_test_broker_is_no_surprise() -> None:
    """A backend in memory shares no database, whatever attributes it has."""
    assert not hasattr(InMemoryBroker().result_backend, "database")
