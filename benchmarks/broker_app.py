"""The brokers that are compared, each with its own result backend; `taskiq worker` runs them."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from taskiq import AsyncBroker
from taskiq_pg.asyncpg import AsyncpgBroker, AsyncpgResultBackend
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend


@dataclass(frozen=True, slots=True)
class BrokerContender:
    """A broker; `make` takes the address of its server and a name for its tables or its queue."""

    name: str
    make: Callable[[str, str], AsyncBroker]
    uses_redis: bool = False

    def results_of(self, name: str) -> str:
        """The table that has its results."""
        return f"{name}_results"


def _ours(dsn: str, name: str) -> AsyncBroker:
    table = f"{name}_results"
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        dsn, table_name=table, run_migrations=True
    )
    broker = SQLAlchemyBroker(dsn, table_name=table, run_migrations=True)
    return broker.with_result_backend(backend)


def _peer(dsn: str, name: str) -> AsyncBroker:
    backend = AsyncpgResultBackend(dsn, table_name=f"{name}_results")
    broker = AsyncpgBroker(dsn, channel_name=name, table_name=f"{name}_queue")
    return broker.with_result_backend(backend)


def _redis_peer(url: str, name: str) -> AsyncBroker:
    backend: RedisAsyncResultBackend[Any] = RedisAsyncResultBackend(url)
    broker: AsyncBroker = RedisStreamBroker(url, queue_name=name).with_result_backend(backend)
    return broker


OURS: Final = BrokerContender("taskiq_sa_pg", _ours)
PEER: Final = BrokerContender("taskiq-postgres", _peer)
# Whatever sets these two apart is the noise of the run.
PEER_AGAIN: Final = BrokerContender("taskiq-postgres, again", _peer)
REDIS_PEER: Final = BrokerContender("taskiq-redis", _redis_peer, uses_redis=True)
CONTENDERS: Final = (OURS, PEER, PEER_AGAIN, REDIS_PEER)


def make_broker(name: str, address: str, queue: str) -> AsyncBroker:
    """The broker of this name, with the task that is measured, for both sides."""
    contender = next(each for each in CONTENDERS if each.name == name)
    broker = contender.make(address, queue)
    _ = broker.register_task(_begin, "begin")
    return broker


async def _begin() -> float:
    return time.monotonic()  # comparable with the sender's, because all is on one machine


def _is_not_about_a_task(record: logging.LogRecord) -> bool:
    return not record.msg.startswith("Executing task")


if "BENCH_BROKER" in os.environ:  # in a worker
    # A line for each task takes as long as some of the brokers.
    logging.getLogger("taskiq.receiver.receiver").addFilter(_is_not_about_a_task)
    broker = make_broker(*(os.environ[f"BENCH_{part}"] for part in ("BROKER", "ADDRESS", "QUEUE")))
