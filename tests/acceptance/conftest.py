"""Worker processes on a schema of their own, once for each payload type."""

import importlib
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio
from demo import make_broker_table, workers

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.conftest import Database

HERE = Path(__file__).parent


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["Bytea", "Jsonb"])
async def tasks(server_dsn: str, request: pytest.FixtureRequest) -> AsyncIterator[ModuleType]:
    """The module `tasks`, its broker started here and served by two worker processes."""
    database = Database(server_dsn, f"test_{uuid.uuid4().hex}")
    await database.fetch(f"CREATE SCHEMA {database.schema}")
    await make_broker_table(database.dsn)
    await make_results_tables(database.dsn, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKIQ_SA_PG_DSN", database.dsn)
        patch.setenv("ACCEPTANCE_PAYLOAD", request.param)
        patch.syspath_prepend(HERE)
        module = importlib.import_module("tasks")
        with workers("tasks:broker", cwd=HERE):
            await module.broker.startup()
            yield module
            await module.broker.shutdown()
        del sys.modules["tasks"]
    await database.fetch(f"DROP SCHEMA {database.schema} CASCADE")


async def make_results_tables(dsn: str, payload: Any) -> None:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        dsn, field_for_payload=payload, run_migrations=True
    )
    await backend.startup()
    await backend.shutdown()
