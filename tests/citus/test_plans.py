"""What is asked by task ids goes to the shards of these tasks alone."""

import re
from typing import Any

import pytest

from taskiq_sa_pg import Models, build_models
from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.statements.delete import delete_over
from tests.citus.places import LAYOUTS, Tables
from tests.tasks import new_id
from tests.unit.sql import DIALECT

distributed = pytest.mark.parametrize("tables", LAYOUTS[2:3], indirect=True, ids=str)


async def task_counts(tables: Tables, statement: Any, **parameters: Any) -> list[int]:
    """To how many shards each part of a statement goes."""
    compiled = statement.compile(dialect=DIALECT)
    values = {**compiled.params, **parameters}
    arguments = [values[name] for name in compiled.positiontup]
    rows = await tables.fetch(f"EXPLAIN (COSTS OFF) {compiled}", *arguments)
    plan = "\n".join(row[0] for row in rows)
    return [int(count) for count in re.findall(r"Task Count: (\d+)", plan)]


def by_ids(models: Models) -> dict[str, Any]:
    status = models.status_table
    assert status is not None
    return {
        "ready": sql.select_ready(models),
        "results": sql.select_results(models),
        "progress": sql.select_progress(models),
        "having progress": sql.select_having_progress(models),
        "messages": sql.select_messages(models),
        "details": sql.select_details(models, with_payload=True),
        "statuses": sql.select_statuses(models),
        "taken": sql.take_results(models, is_tracked=True),
        "forgotten": sql.forget_results(models),
        "over": delete_over(models.results_table, status),
    }


@distributed
async def test_one_task_is_asked_of_one_shard_in_one_query(tables: Tables) -> None:
    for name, statement in by_ids(build_models(schema=tables.schema)).items():
        assert await task_counts(tables, statement, task_ids=[new_id()]) == [1], name


@distributed
async def test_several_tasks_are_asked_of_their_shards(tables: Tables) -> None:
    task_ids = [new_id() for _ in range(3)]
    shard = "get_shard_id_for_distribution_column('taskiq_results', id)"
    query = f"SELECT count(DISTINCT {shard}) FROM unnest($1::text[]) id"
    [[shards]] = await tables.fetch(query, task_ids)
    for name, statement in by_ids(build_models(schema=tables.schema)).items():
        counts = await task_counts(tables, statement, task_ids=task_ids)
        assert max(counts) == shards, name


@distributed
async def test_one_task_is_stored_in_one_shard(tables: Tables) -> None:
    status = build_models(schema=tables.schema).status_table
    assert status is not None
    row = sql.StatusRow(new_id(), "queued", None, 0, None, None, None)
    [(upsert, values)] = sql.upsert_status(status, by_values=True).of([row])
    assert isinstance(values, dict)
    assert await task_counts(tables, upsert, **values) == [1]
    gone = {"task_id": [row.task_id], "attempt": [0], "queued_at": [None]}
    assert await task_counts(tables, sql.delete_statuses(status), **gone) == [1]


@distributed
async def test_the_queue_is_asked_beside_the_shard(tables: Tables) -> None:
    models = build_models(schema=tables.schema, queue=True)
    statuses = sql.select_statuses(models)
    assert await task_counts(tables, statuses, task_ids=[new_id()]) == [1, 1]
