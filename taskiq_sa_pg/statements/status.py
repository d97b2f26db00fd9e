"""Selects the status of tasks from the status table and the results, as StoredStatus."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Integer,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    literal_column,
    null,
    select,
)

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StatusRow, StoredStatus
from taskiq_sa_pg.statements.select import is_asked_for, is_live, is_over
from taskiq_sa_pg.statements.workers import is_lost, is_started, with_worker

# Both tables have these columns. `state` is a column of the status table only.
_COMMON = ("task_name", "attempt", "queued_at", "started_at", "worker")


def select_statuses(models: Models) -> Select[Any]:
    """The status of the `task_ids`, from their result or the status table, whichever is later.

    A task in neither is "queued" if it is in the queue and the models have one; a task that was
    sent in a session's transaction has no other trace. Unknown tasks are omitted.
    """
    known, queue = _select_known(models), models.queue_table
    if queue is None:
        return known
    # Materialized, because Citus cannot join a distributed table with one that is not.
    found = known.cte("found").prefix_with("MATERIALIZED")
    queued = _of_asked(queue, ("task_name", "queued_at"))
    of_queue: dict[str, ColumnElement[Any]] = {
        "state": _text("queued"),
        "attempt": literal_column("0", Integer),
        **{c.name: c for c in queued.c},
    }
    is_unknown = found.c.task_id.is_(None)
    columns = [case((is_unknown, of_queue.get(c.name, null())), else_=c) for c in found.c]
    both = found.outerjoin(queued, queued.c.task_id == found.c.task_id, full=True)
    return select(*columns).select_from(both)


def _select_known(models: Models) -> Select[Any]:
    """The same from the results and the status table only."""
    # Each is filtered separately, so that Citus reads only the shards of these tasks.
    results = _of_asked(models.results_table, (*_COMMON, "finished_at", "expires_at", "is_err"))
    state = case(
        (~is_live(results), _text("expired")),
        (results.c.is_err, _text("failed")),
        else_=_text("succeeded"),
    )
    values: dict[str, ColumnElement[Any]] = {"task_id": results.c.task_id, "state": state}
    values |= {name: results.c[name] for name in (*_COMMON, "finished_at")}
    found: FromClause = results
    if models.status_table is not None:
        status = _of_asked(models.status_table, (*_COMMON, "state", "updated_at"))
        workers = models.workers_table
        is_finished, is_tracked = results.c.task_id.is_not(None), status.c.task_id.is_not(None)
        is_later = is_tracked & ~and_(is_finished, is_over(results, status))
        of_status: dict[str, ColumnElement[Any]] = {
            "task_id": status.c.task_id,
            "state": _state(status, workers),
            **{name: status.c[name] for name in _COMMON},
        }
        values = {n: case((is_later, of_status.get(n, null())), else_=values[n]) for n in values}
        found = results.outerjoin(status, status.c.task_id == results.c.task_id, full=True)
        if workers is not None:
            found = with_worker(found, status, workers)
    return select(*[value.label(name) for name, value in values.items()]).select_from(found)


def _of_asked(source: Table, names: Sequence[str]) -> FromClause:
    columns = [source.c[name] for name in ("task_id", *names)]
    return select(*columns).where(is_asked_for(source)).subquery()


def select_running(models: Models, status: Table) -> Select[Any]:
    """At most `limit` tasks that are running, those that started first at the top."""
    workers = models.workers_table
    columns = [status.c[n] if n != "state" else _state(status, workers) for n in StatusRow._fields]
    return (
        select(*columns, null().label(StoredStatus._fields[-1]))
        .select_from(status if workers is None else with_worker(status, status, workers))
        .where(is_started(models, status))
        .order_by(status.c.started_at, status.c.task_id)
        .limit(bindparam("limit", type_=Integer))
    )


def _state(status: FromClause, workers: Table | None) -> ColumnElement[Any]:
    if workers is None:
        return status.c.state
    is_gone = and_(status.c.state == _text("started"), is_lost(status, workers))
    return case((is_gone, _text("lost")), else_=status.c.state).label("state")


def _text(value: str) -> ColumnElement[str]:
    return literal_column(f"'{value}'", Text)
