"""Worker processes on a schema of their own, for each payload type."""

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from demo import workers

from tests.conftest import NewDatabase

HERE = Path(__file__).parent

# What is in the module `tasks`, with the backend and the tasks of one of its brokers.
Tasks = SimpleNamespace
Clients = dict[str, Tasks]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clients(new_database: NewDatabase) -> AsyncIterator[Clients]:
    """By payload type, what worker processes serve meanwhile."""
    database = new_database()
    await database.create()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as served:
        patch.setenv("TASKIQ_SA_PG_DSN", database.dsn)
        patch.syspath_prepend(HERE)
        module = importlib.import_module("tasks")
        brokers = {"Bytea": module.bytea_broker, "Jsonb": module.jsonb_broker}
        for broker in brokers.values():
            await broker.startup()
        starting = (
            workers(f"tasks:{payload.lower()}_broker", cwd=HERE, count=count, stop_timeout=0)
            for payload, count in (("Bytea", 2), ("Jsonb", 1))
        )
        await asyncio.gather(*(asyncio.to_thread(served.enter_context, w) for w in starting))
        yield {payload: client_of(module, broker) for payload, broker in brokers.items()}
        for broker in brokers.values():
            await broker.shutdown()
        del sys.modules["tasks"]
    await database.drop()


def client_of(module: Any, broker: Any) -> Tasks:
    return Tasks(**{**vars(module), **broker.get_all_tasks(), "backend": broker.result_backend})


@pytest.fixture
def tasks(clients: Clients) -> Tasks:
    return clients["Bytea"]


@pytest.fixture(params=["Bytea", "Jsonb"])
def tasks_of_each(clients: Clients, request: pytest.FixtureRequest) -> Tasks:
    return clients[request.param]
