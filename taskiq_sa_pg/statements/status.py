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
    func,
    literal_column,
    null,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StatusRow, StoredStatus
from taskiq_sa_pg.statements.select import is_live, is_over
from taskiq_sa_pg.statements.workers import is_lost, is_started, with_worker

# Both tables have these columns; `state` is in the one, and made of the other.
_COMMON = ("task_name", "attempt", "queued_at", "started_at", "worker")


def select_statuses(models: Models) -> Select[Any]:
    """What the `task_ids` are at, by their results and the status table, whichever is later.

    A task of which neither knows is "queued" where it is in the queue, if the models have one: that
    is all that is told of one that was sent in a transaction. Unknown tasks are left out.
    """
    results, status, queue = models.results_table, models.status_table, models.queue_table
    workers = models.workers_table
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
        is_later = status.c.task_id.is_not(None) & ~and_(is_known, is_over(results, status))
        of_status: dict[str, ColumnElement[Any]] = {"state": _state(status, workers)}
        of_status.update({name: status.c[name] for name in _COMMON})
        values = {n: case((is_later, of_status.get(n, null())), else_=values[n]) for n in values}
        found = found.outerjoin(status, status.c.task_id == asked.c.task_id)
        is_known |= status.c.task_id.is_not(None)
        if workers is not None:
            found = with_worker(found, status, workers)
    if queue is not None:
        of_queue = {"state": _text("queued"), "attempt": literal_column("0", Integer)}
        of_queue |= {name: queue.c[name] for name in ("task_name", "queued_at")}
        values = {n: case((is_known, values[n]), else_=of_queue.get(n, null())) for n in values}
        found = found.outerjoin(queue, queue.c.task_id == asked.c.task_id)
        is_known |= queue.c.task_id.is_not(None)
    return select(asked.c.task_id, *values.values()).select_from(found).where(is_known)


def select_running(models: Models, status: Table) -> Select[Any]:
    """The tasks that are executed, the longest first; at most `limit`."""
    workers = models.workers_table
    columns = [status.c[n] if n != "state" else _state(status, workers) for n in StatusRow._fields]
    return (
        select(*columns, null().label(StoredStatus._fields[-1]))
        .select_from(status if workers is None else with_worker(status, status, workers))
        .where(is_started(models, status))
        .order_by(status.c.started_at, status.c.task_id)
        .limit(bindparam("limit", type_=Integer))
    )


def _state(status: Table, workers: Table | None) -> ColumnElement[Any]:
    if workers is None:
        return status.c.state
    is_gone = and_(status.c.state == _text("started"), is_lost(status, workers))
    return case((is_gone, _text("lost")), else_=status.c.state).label("state")


def _text(value: str) -> ColumnElement[str]:
    return literal_column(f"'{value}'", Text)
