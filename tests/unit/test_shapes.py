"""How rows become an INSERT: its shapes, the order of the rows, and that no value strays."""

import random
from operator import itemgetter
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from taskiq_sa_pg import Models, ProgressMixin, ResultMixin, StatusMixin, build_models
from taskiq_sa_pg.statements import (
    Call,
    ProgressRow,
    ResultRow,
    StatusRow,
    Upsert,
    insert_progress,
    insert_results,
    upsert_progress,
    upsert_results,
    upsert_status,
)
from tests.unit.sql import DIALECT, compiled

MODELS = build_models()


class Base(DeclarativeBase):
    pass


class OwnResult(ResultMixin, Base):
    tenant: Mapped[str | None] = mapped_column("tenant_name")
    tenant__1: Mapped[str | None]


class OwnProgress(ProgressMixin, Base):
    stamp: Mapped[str] = mapped_column(default=lambda: "called")


class OwnStatus(StatusMixin, Base):
    number: Mapped[int] = mapped_column(default=7)


OWN = Models(OwnResult, OwnProgress, OwnStatus)
EXTRA = {
    "tenant": OWN.results_table.c.tenant_name,
    "tenant__1": OWN.results_table.c.tenant__1,
}


def result_rows(number: int) -> list[ResultRow]:
    """Rows of different values, in no order."""
    rows = [
        ResultRow(
            *(f"{i:04}", bool(i % 2), b"value %d" % i, None, None, f"trace {i}", i / 4, "{}"),
            *(f"log {i}", f"task {i}", i, float(i)),
        )
        for i in range(number)
    ]
    random.Random(number).shuffle(rows)
    return rows


def progress_rows(number: int) -> list[ProgressRow]:
    rows = [ProgressRow(f"{i:04}", f"state {i}", b"%d" % i) for i in range(number)]
    random.Random(number).shuffle(rows)
    return rows


def sent(call: Call) -> list[Any]:
    """The values as the driver gets them, in the order of the text's parameters."""
    statement, parameters = call
    sql: Any = statement.compile(dialect=DIALECT)
    values = sql.construct_params(parameters)
    return [values[name] for name in sql.positiontup]


def test_one_row_has_a_text_of_its_own() -> None:
    upsert = upsert_results(MODELS)
    [row], [other] = result_rows(1), [result_rows(2)[0]]
    [call], [other_call] = upsert.of([row]), upsert.of([other])
    assert call[0] is other_call[0]
    assert call[1] == row._asdict()
    assert sent(call) == list(row)
    assert "unnest" not in compiled(call[0])


def test_any_number_of_rows_has_one_text_with_an_array_for_each_column() -> None:
    upsert = upsert_results(MODELS)
    statements = set()
    for number in (2, 3, 64, 499, 500):
        [(statement, arrays)] = upsert.of(result_rows(number))
        statements.add(statement)
        rows = zip(*[arrays[name] for name in ResultRow._fields], strict=True)
        assert list(map(ResultRow._make, rows)) == sorted(result_rows(number))
    [statement] = statements
    assert compiled(statement).count("unnest(") == len(ResultRow._fields)


@pytest.mark.parametrize("number", [1, 2, 100])
def test_rows_are_sorted_by_task_id_in_every_shape(number: int) -> None:
    """Upserts that lock their rows in different orders deadlock."""
    rows = [ProgressRow(UUID(int=2**i), "x", None) for i in range(number)]
    ids = sorted(row.task_id for row in rows)
    random.Random(1).shuffle(rows)
    upsert = upsert_progress(build_models(field_for_task_id="Uuid"))
    [(_, parameters)] = upsert.of(rows)
    assert parameters["task_id"] == (tuple(ids) if number > 1 else ids[0])
    calls = upsert.of_mappings([row._asdict() for row in rows])
    values = [[each] if isinstance(each, dict) else each for _, each in calls]
    assert [row["task_id"] for part in values for row in part] == ids


def test_nothing_is_stored_by_no_statement() -> None:
    assert upsert_results(MODELS).of([]) == upsert_results(MODELS).of_mappings([]) == []


def test_rows_with_values_of_the_applications_own_go_as_values() -> None:
    """At most 64 in a statement: the server keeps a plan for each number of rows."""
    upsert = upsert_results(OWN, EXTRA)
    rows = [
        {**row._asdict(), "tenant": f"t {row.task_id}", "tenant__1": f"other {row.task_id}"}
        for row in result_rows(100)
    ]
    [(statement, values), (again, rest)] = upsert.of_mappings(rows)
    assert again is statement
    assert [len(values), len(rest)] == [64, 36]
    assert [*values, *rest] == sorted(rows, key=itemgetter("task_id"))
    [(alone, value)] = upsert.of_mappings(rows[:1])
    assert value == rows[0]
    assert "unnest" not in compiled(statement) + compiled(alone)


@pytest.mark.parametrize(
    "upsert",
    [
        upsert_results(MODELS, by_values=True),
        upsert_results(MODELS, is_tracked=True, by_values=True),
        upsert_progress(MODELS, by_values=True),
        upsert_status(MODELS.status_table, by_values=True),  # type: ignore[arg-type]  # it has one
    ],
    ids=["results", "tracked results", "progress", "statuses"],
)
def test_sqlalchemy_makes_one_statement_of_rows_that_go_by_values(upsert: Upsert) -> None:
    """Of which it needs a RETURNING; else each row would be a statement."""
    rows = [{"task_id": "b", "queued_at": None}, {"task_id": "a", "queued_at": None}]
    (statement, values), *then = upsert.of_mappings(rows)
    assert values == rows[::-1]
    sql: Any = statement.compile(dialect=DIALECT, column_keys=["task_id"], for_executemany=True)
    assert sql._insertmanyvalues is not None
    assert "DELETE" not in compiled(statement)
    assert [parameters for _, parameters in then] == [{"task_ids": ["a", "b"]}] * len(then)


def test_a_default_that_is_called_is_called_for_each_row() -> None:
    """Of INSERT ... SELECT, SQLAlchemy would call it once for all."""
    upsert = upsert_progress(OWN)
    [(statement, values)] = upsert.of(progress_rows(5))
    assert len(values) == 5
    assert "unnest" not in compiled(statement)
    # One that is a value is the same for all.
    assert OWN.status_table is not None
    statuses = [StatusRow(f"{i}", "queued", None, 0, None, None, None) for i in range(5)]
    [(statement, arrays)] = upsert_status(OWN.status_table).of(statuses)
    assert len(arrays["task_id"]) == 5
    assert "unnest" in compiled(statement)


@pytest.mark.parametrize("number", [1, 5])
def test_the_status_of_the_same_tasks_is_deleted_with_each_shape(number: int) -> None:
    tracked = upsert_results(MODELS, is_tracked=True)
    [(statement, parameters)] = tracked.of(result_rows(number))
    assert compiled(statement).count('DELETE FROM "taskiq_results_status"') == 1
    # By the very parameters that are stored.
    assert set(statement.compile(dialect=DIALECT).params) == set(parameters)
    by_values = upsert_results(MODELS, is_tracked=True, by_values=True)
    [_, (then, _)] = by_values.of(result_rows(number))
    assert compiled(then).startswith('DELETE FROM "taskiq_results_status"')
    for statement, _ in upsert_results(MODELS).of(result_rows(number)):
        assert "DELETE" not in compiled(statement)


def test_one_row_is_one_statement_with_all_that_goes_with_it() -> None:
    """As a statement of its own, the deletion would take three round trips more."""
    upsert = upsert_results(OWN, EXTRA, is_tracked=True)
    row = {**result_rows(1)[0]._asdict(), "tenant": "t", "tenant__1": "other"}
    [(statement, _)] = upsert.of_mappings([row])
    assert 'DELETE FROM "taskiq_results_status"' in compiled(statement)


@pytest.mark.parametrize("number", [1, 5])
def test_what_stores_only_what_is_missing_returns_the_ids_of_what_it_has_stored(
    number: int,
) -> None:
    for upsert, rows, name in (
        (insert_results(MODELS), result_rows(number), "taskiq_results"),
        (insert_progress(MODELS), progress_rows(number), "taskiq_results_progress"),
    ):
        [(statement, _)] = upsert.of(rows)
        assert compiled(statement).endswith(f' RETURNING "{name}".task_id')
