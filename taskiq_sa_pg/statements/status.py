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

    A task of which neither knows is "queued" where it is in the queue, if the models have one: that
    is all that is told of one that was sent in a transaction. Unknown tasks are left out.
    """
    results, status, queue = models.results_table, models.status_table, models.queue_table
    type_ = results.c.task_id.type
    asked = (
        func.unnest(bindparam("task_ids", type_=ARRAY(type_)))
        .table_valued(column("task_id", type_))
        .render_derived(name="asked")
    )
    found = asked.outerjoin(results, results.c.task_id == asked.c.task_id)
    is_known: ColumnElement[bool] = results.c.task_id.is_not(None)
    state = case(
        (~is_live(results), _text("expired")),
        (results.c.is_err, _text("failed")),
        else_=_text("succeeded"),
    )
    values: dict[str, ColumnElement[Any]] = {"state": state}
    values |= {name: results.c[name] for name in (*_COMMON, "finished_at")}
    if status is not None:
        is_later = status.c.task_id.is_not(None) & ~and_(is_known, _is_over(results, status))
        of_status = {name: status.c[name] for name in ("state", *_COMMON)}
        values = {n: case((is_later, of_status.get(n, null())), else_=values[n]) for n in values}
        found = found.outerjoin(status, status.c.task_id == asked.c.task_id)
        is_known |= status.c.task_id.is_not(None)
    if queue is not None:
        of_queue = {"state": _text("queued"), "attempt": literal_column("0", Integer)}
        of_queue |= {name: queue.c[name] for name in ("task_name", "queued_at")}
        values = {n: case((is_known, values[n]), else_=of_queue.get(n, null())) for n in values}
        found = found.outerjoin(queue, queue.c.task_id == asked.c.task_id)
        is_known |= queue.c.task_id.is_not(None)
    return select(asked.c.task_id, *values.values()).select_from(found).where(is_known)


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
