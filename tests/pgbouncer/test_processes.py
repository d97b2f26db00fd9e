"""Several processes behind a PgBouncer: none may execute a statement of another's."""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.conftest import BackendFactory, Database
from tests.pooler import Pooler
from tests.tasks import new_id

Backend = SQLAlchemyResultBackend[Any]

PROCESSES = 3

each_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


async def client(dsn: str, number: int, task_ids: list[str]) -> tuple[set[str], list[str]]:
    """The ids of results that it has found lost or mixed up, and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.pgbouncer.client", dsn, str(number), str(PROCESSES), json.dumps(task_ids)),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    wrong, errors = json.loads(output)
    return set(wrong), errors


async def assert_nothing_is_mixed_up(backend: Backend, dsn: str) -> None:
    task_ids = [new_id() for _ in range(500)]
    answers = await asyncio.gather(*[client(dsn, each, task_ids) for each in range(PROCESSES)])
    lost_or_mixed = {task_id for wrong, _ in answers for task_id in wrong}
    taken = {i for number in range(PROCESSES) for i in task_ids[number::PROCESSES][::2]}
    found = await backend.get_results(task_ids)
    lost_or_mixed |= {i for i, result in found.items() if result.return_value != i}
    lost_or_mixed |= (set(task_ids) - taken) ^ set(found)
    errors = sorted({error for _, each in answers for error in each})
    assert len(lost_or_mixed) == 0, errors
    assert errors == []


@each_driver
@pytest.mark.parametrize("place", ["direct", "old_pooler", "new_pooler", "session_pooler"])
async def test_no_process_runs_another_s_statements(
    place: str,
    driver: str,
    database: Database,
    request: pytest.FixtureRequest,
    start_backend: BackendFactory,
) -> None:
    """With nothing in the address, wherever it leads."""
    backend: Backend = await start_backend(database.direct_dsn)
    pooler = None if place == "direct" else request.getfixturevalue(place)
    await assert_nothing_is_mixed_up(backend, replace(database, pooler=pooler).dsn_of(driver))


@each_driver
async def test_prepared_statements_are_carried_where_the_address_says_so(
    driver: str, database: Database, new_pooler: Pooler, start_backend: BackendFactory
) -> None:
    if not new_pooler.carries:
        pytest.skip("this PgBouncer carries no prepared statements: 1.21 is the first that does")
    backend: Backend = await start_backend(database.direct_dsn)
    dsn = new_pooler.dsn(database.schema, driver, prepare=True)
    await assert_nothing_is_mixed_up(backend, dsn)
