"""The commands on tables of a Citus cluster: after they were laid out, too."""

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from taskiq_sa_pg import Models, SQLAlchemyResultBackend, TaskStatus
from tests.citus.places import Tables
from tests.commands import run_taskiq_sa_pg
from tests.tasks import progress_of, result_of

APPLICATION = """
from taskiq import InMemoryBroker
from taskiq_sa_pg import SQLAlchemyResultBackend, TaskMetadataMiddleware

backend = SQLAlchemyResultBackend({arguments})
broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
broker.add_middlewares(TaskMetadataMiddleware(record_args=True))


@broker.task(task_name="add")
async def add(one, two):
    return one + two
"""


def run(tables: Tables, *arguments: str, status: int = 0) -> str:
    result = run_taskiq_sa_pg(*arguments, env=tables.environment)
    assert (result.exit_code, result.stderr) == (status, ""), result.output
    return result.stdout


def test_the_schema_is_as_it_was_made(tables: Tables) -> None:
    for command in ("check", "upgrade"):
        run(tables, command, "--queue")
    assert "0001" in run(tables, "current", "--queue")


def test_what_is_stored_is_shown(tables: Tables, models: Models) -> None:
    task_id, other = str(uuid4()), str(uuid4())

    async def store() -> None:
        backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
            tables.dsn("asyncpg"), models=models, track="started"
        )
        await backend.startup()
        await backend.set_result(task_id, result_of(1))
        await backend.set_progress(task_id, progress_of(2))
        await backend.set_status(TaskStatus(other, "started", worker="us"))
        await backend.shutdown()

    asyncio.run(store())
    assert "return_value:   1\n" in run(tables, "show", task_id)
    assert task_id in run(tables, "list")
    assert json.loads(run(tables, "status", other, "--json"))["state"] == "started"
    assert other in run(tables, "running")
    asyncio.run(tables.execute("INSERT INTO taskiq_results_workers (worker) VALUES ('us')"))
    assert " alive " in run(tables, "workers")
    run(tables, "watch", task_id)
    run(tables, "prune", "--dry-run", "--progress-ttl", "3600")
    for command in ("queue", "parked"):
        run(tables, command)
    run(tables, "release", "--all")
    run(tables, "discard", "--all", "--yes")


def test_the_size_is_that_of_all_shards(tables: Tables) -> None:
    shown = json.loads(run(tables, "stats", "--json"))["bytes"]
    query = (
        "SELECT relname::text, sum(shard_size)::bigint FROM citus_shards "
        "JOIN pg_class ON pg_class.oid = table_name WHERE relnamespace = $1::regnamespace "
        "GROUP BY 1"
    )
    sizes = dict(map(tuple, asyncio.run(tables.fetch(query, tables.schema))))
    assert shown == {name: sizes[name] for name in tables.config.table_names}


def test_a_task_is_sent_again(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tables.config
    arguments = (
        f"{tables.dsn('asyncpg')!r}, schema={config.schema!r}, "
        f"field_for_task_id={config.field_for_task_id!r}, "
        f"field_for_payload={config.field_for_payload!r}"
    )
    (tmp_path / "app_on_citus.py").write_text(APPLICATION.format(arguments=arguments))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "app_on_citus", raising=False)
    module: Any = importlib.import_module("app_on_citus")
    task_id = str(uuid4())

    async def execute() -> None:
        await module.broker.startup()
        await module.backend.startup()
        await module.add.kicker().with_task_id(task_id).kiq(1, 2)
        await module.broker.shutdown()
        await module.backend.shutdown()

    asyncio.run(execute())
    [sent] = run(tables, "retry", "--broker", "app_on_citus:broker", task_id).split()
    assert "return_value:   3\n" in run(tables, "show", sent)
