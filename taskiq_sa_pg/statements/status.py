"""What tasks are at, of the status table and the results: reads give StoredStatus."""

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    column,
    exists,
    func,
    literal_column,
    null,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StatusRow, StoredStatus
from taskiq_sa_pg.statements.select import is_live

# Both tables have these columns; `state` is in the one, and made of the other.
_COMMON = ("task_name", "attempt", "queued_at", "started_at", "worker")


def select_statuses(models: Models) -> Select[Any]:
    """What the `task_ids` are at, by their results and the status table, whichever is later.

    Tasks of which nothing is known are left out.
    """
    results, status = models.results_table, models.status_table
    type_ = results.c.task_id.type
    asked = (
        func.unnest(bindparam("task_ids", type_=ARRAY(type_)))
        .table_valued(column("task_id", type_))
        .render_derived(name="asked")
    )
    found = asked.outerjoin(results, results.c.task_id == asked.c.task_id)
    has_result = results.c.task_id.is_not(None)
    state = case(
        (~is_live(results), _text("expired")),
        (results.c.is_err, _text("failed")),
        else_=_text("succeeded"),
    )
    of_result = {"state": state, **{name: results.c[name] for name in _COMMON}}
    finished_at: ColumnElement[Any] = results.c.finished_at
    if status is None:
        values = [asked.c.task_id, *of_result.values(), finished_at]
        return select(*values).select_from(found).where(has_result)
    is_unfinished = status.c.task_id.is_not(None) & ~and_(has_result, _is_over(results, status))
    values = [case((is_unfinished, status.c[n]), else_=value) for n, value in of_result.items()]
    return (
        select(asked.c.task_id, *values, case((~is_unfinished, finished_at)))
        .select_from(found.outerjoin(status, status.c.task_id == asked.c.task_id))
        .where(has_result | status.c.task_id.is_not(None))
    )


def select_running(models: Models, status: Table) -> Select[Any]:
    """The tasks that are executed, the longest first; at most `limit`."""
    results = models.results_table
    result = select(results.c.task_id).where(
        results.c.task_id == status.c.task_id, _is_over(results, status)
    )
    columns = [status.c[name] for name in StatusRow._fields]
    return (
        select(*columns, null().label(StoredStatus._fields[-1]))
        .where(status.c.state == _text("started"), ~exists(result))
        .order_by(status.c.started_at, status.c.task_id)
        .limit(bindparam("limit", type_=Integer))
    )


def _is_over(results: Table, status: Table) -> ColumnElement[bool]:
    """Whether the result is not older than what the status table says."""
    of_result = tuple_(results.c.attempt, results.c.finished_at)
    is_later = of_result >= tuple_(status.c.attempt, status.c.updated_at)
    # The task id is used again.
    return is_later & (status.c.queued_at > results.c.queued_at).is_not(true())


def _text(value: str) -> ColumnElement[str]:
    return literal_column(f"'{value}'", Text)
