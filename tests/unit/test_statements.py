"""Every statement: one at a time, and whatever the tables are called, nothing else changes."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import true

from taskiq_sa_pg import Models, build_models
from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.schema import describe_columns, select_sizes
from tests.unit.sql import compiled, names

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NOBODY = UUID(int=0)

ROWS: dict[type[Any], list[Any]] = {
    fields: [fields._make([str(number), *[None] * (len(fields._fields) - 1)]) for number in (1, 2)]
    for fields in (sql.ResultRow, sql.ProgressRow, sql.StatusRow)
}


def of_tables(models: Models) -> Iterator[Any]:
    """Every statement on the tables."""
    status, workers = models.status_table, models.workers_table
    assert status is not None
    assert workers is not None
    for fields, upserts in {
        sql.ResultRow: (
            sql.upsert_results(models),
            sql.upsert_results(models, is_tracked=True),
            sql.upsert_results(models, is_tracked=True, by_values=True),
            sql.insert_results(models),
        ),
        sql.ProgressRow: (
            sql.upsert_progress(models),
            sql.upsert_progress(models, by_values=True),
            sql.insert_progress(models),
        ),
        sql.StatusRow: (sql.upsert_status(status),),
    }.items():
        for upsert in upserts:
            for rows in (ROWS[fields][:1], ROWS[fields]):
                yield from [statement for statement, _ in upsert.of(rows)]
    for select in (
        *(sql.select_ready, sql.select_results, sql.select_progress, sql.select_having_progress),
        *(sql.select_statuses, sql.select_counts, sql.count_progress),
        *(sql.forget_results, sql.count_expired),
    ):
        yield select(models)
    yield sql.take_results(models, is_tracked=True)
    yield sql.take_results(models, is_tracked=False)
    yield sql.select_matching(models, [true()], [])
    yield sql.select_details(models, with_payload=False)
    yield sql.select_details(models, with_payload=True)
    yield from map(partial(find, models), ([], conditions_of(models)))
    yield sql.select_running(models, status)
    yield sql.delete_statuses(status)
    yield sql.beat(workers)
    yield sql.delete_worker(workers)
    yield sql.select_workers(models, workers)
    yield sql.select_lost(models, status, workers)
    expires_at = models.results_table.c.expires_at
    for start, end in ((None, None), (None, NOW), (NOW, NOW)):
        yield sql.begin_slice(expires_at, start, 1)
        yield sql.prune_results(models, sql.Slice(start, end, 1))
    for table in models.other_tables:
        yield sql.begin_slice(table.c.task_id, NOBODY, 1)
        yield sql.prune_stale(models, table, sql.Slice(NOBODY, None, 1))
        yield sql.prune_stale(models, table, sql.Slice(NOBODY, None, 2, 1))
        yield sql.count_stale(models, table)


def find(models: Models, conditions: list[Any]) -> Any:
    return sql.select_records(models, conditions, sql.Span(NOW, NOW, NOBODY), 1)


def conditions_of(models: Models) -> list[Any]:
    values: list[sql.Scalar] = [1, "1"]
    return [
        sql.has_outcome(models, is_err=True),
        sql.has_text(models, "task_name", "a"),
        sql.has_label(models, "a", values),
        sql.has_argument(models, "a", values),
        sql.has_argument(models, 0, values),
        sql.has_any_argument(models, values),
    ]


def texts(models: Models) -> list[str]:
    config = models.config
    others = (
        sql.notify(),
        sql.begin_search(1.0),
        describe_columns(config.table_names, None),
        select_sizes(config),
    )
    return [*map(compiled, of_tables(models)), *map(compiled, others)]


def without_quoted_names(text: str) -> str:
    return re.sub(r'"(?:[^"]|"")*"', "NAME", text)


@pytest.fixture(scope="module")
def usual() -> dict[bool, list[str]]:
    """By whether there is a schema: the texts of tables with usual names."""
    models = {False: build_models(), True: build_models(schema="app")}
    return {key: list(map(without_quoted_names, texts(value))) for key, value in models.items()}


def test_every_operation_is_one_statement(usual: dict[bool, list[str]]) -> None:
    assert all(";" not in text for text in usual[True])


@settings(max_examples=3)
@example('a"b', None)
@example("100%:b", '";--')
@given(names, st.none() | names)
def test_nothing_of_a_name_stands_unquoted_in_any_sql(
    usual: dict[bool, list[str]], name: str, schema: str | None
) -> None:
    found = texts(build_models(name, schema=schema))
    assert list(map(without_quoted_names, found)) == usual[schema is not None]


def test_names_are_quoted_even_where_todays_postgresql_needs_no_quotes() -> None:
    for statement in of_tables(build_models("user", schema="app")):
        assert '"app"."user' in compiled(statement)


def test_no_statement_locks_rows_first() -> None:
    """Citus refuses it on distributed tables."""
    assert not [text for text in texts(build_models()) if "FOR UPDATE" in text]


@pytest.mark.parametrize(
    ("field", "sent"), [("VarChar", "TEXT"), ("Text", "TEXT"), ("Uuid", "UUID")]
)
def test_ids_are_sent_in_an_array_that_drivers_know(field: Any, sent: str) -> None:
    """asyncpg looks up varchar[] in another statement, on each connection."""
    text = compiled(sql.select_results(build_models(field_for_task_id=field)))
    assert f"task_id = ANY ($1::{sent}[])" in text


def test_what_is_overwritten_comes_from_excluded_alone() -> None:
    """Citus refuses now() on the right of ON CONFLICT DO UPDATE."""
    overwriting = 0
    for statement in of_tables(build_models()):
        text = " ".join(compiled(statement).split())
        for assigned in re.findall(r"DO UPDATE SET (.*?)(?: WHERE | RETURNING |$)", text):
            if "_workers" in text:  # which keeps the older of two times
                assert "now()" not in assigned
                continue
            overwriting += 1
            for assignment in assigned.split(", "):
                assert re.fullmatch(r'"?(\w+)"? = excluded\."?\1"?', assignment), assignment
    assert overwriting == 14  # of one row and of several: results, progress, statuses
