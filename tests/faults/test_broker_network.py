"""What becomes of tasks when the answer to a statement is lost that was carried out."""

import os
from collections.abc import AsyncIterator

import pytest

from taskiq_sa_pg import SQLAlchemyBroker, build_models
from taskiq_sa_pg.database import make_engine
from tests.faults.proxy import LoseOnce, Proxy, proxied
from tests.faults.servers import Server, ask, dsn_of
from tests.integration.brokers import acknowledge, assert_comes_to_rest, listening, send, take

MODELS = build_models("lost", queue=True)


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with proxied(server.port) as proxy:
        yield proxy


@pytest.fixture
async def broker(server: Server, proxy: Proxy, driver: str) -> AsyncIterator[SQLAlchemyBroker]:
    """Behind the proxy; its lease is short."""
    engine = make_engine(server.dsn)
    async with engine.begin() as connection:
        await connection.run_sync(MODELS.metadata.create_all)
    await engine.dispose()
    await ask(server.dsn, "TRUNCATE lost_queue")
    dsn = dsn_of(proxy.port).replace("postgresql:", f"postgresql+{driver}:", 1)
    # Without notifications, whose statements would be cut, too.
    broker = SQLAlchemyBroker(dsn, models=MODELS, check_schema="off", lease=1.5, notify=False)
    broker.register_task(lambda: None, task_name="task")
    await broker.startup()
    yield broker
    await assert_comes_to_rest(broker)
    await broker.shutdown()


async def test_a_task_whose_answer_was_lost_is_sent_once(
    broker: SQLAlchemyBroker, proxy: Proxy, server: Server
) -> None:
    proxy.watch = lose = LoseOnce(lambda piece: b"order-1" in piece)
    await send(broker, "order-1")
    assert lose.has_lost
    assert len(await ask(server.dsn, "SELECT FROM lost_queue")) == 1


async def test_what_was_claimed_and_never_arrived_comes_when_its_lease_ends(
    broker: SQLAlchemyBroker, proxy: Proxy, server: Server
) -> None:
    await send(broker, "order-1")
    proxy.watch = lose = LoseOnce(lambda piece: str(os.getpid()).encode() in piece)
    async with listening(broker) as messages:
        [message] = await take(messages)
        assert lose.has_lost
        [row] = await ask(server.dsn, "SELECT deliveries FROM lost_queue")
        assert row["deliveries"] == 2
        await acknowledge(message)
    assert await ask(server.dsn, "SELECT FROM lost_queue") == []


async def test_what_was_acknowledged_stays_so(
    broker: SQLAlchemyBroker, proxy: Proxy, server: Server
) -> None:
    await send(broker, "order-1")
    async with listening(broker) as messages:
        [message] = await take(messages)
        proxy.watch = lose = LoseOnce(lambda piece: b"order-1" in piece)
        await acknowledge(message)
        assert lose.has_lost
    assert await ask(server.dsn, "SELECT FROM lost_queue") == []


async def test_what_was_given_back_is_given_back_once(
    broker: SQLAlchemyBroker, proxy: Proxy, server: Server
) -> None:
    """Though the statement is repeated, it counts no delivery away."""
    for number in range(3):
        await send(broker, f"order-{number}")
    async with listening(broker) as messages:
        taken = await take(messages, 2)  # of the second claim one is left
        proxy.watch = lose = LoseOnce(lambda piece: b"order-2" in piece)
    assert lose.has_lost
    query = "SELECT deliveries FROM lost_queue ORDER BY task_id"
    assert [row["deliveries"] for row in await ask(server.dsn, query)] == [1, 1, 0]
    await acknowledge(*taken)
