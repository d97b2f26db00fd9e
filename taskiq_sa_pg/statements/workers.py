"""Worker processes: the heartbeat, the list of workers, and tasks lost with their worker."""

from datetime import timedelta
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Double,
    FromClause,
    Integer,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import insert

from taskiq_sa_pg.models import Models, as_interval
from taskiq_sa_pg.statements.rows import StatusRow
from taskiq_sa_pg.statements.select import is_live, is_over

# Seconds without a heartbeat (four of them) after which a worker counts as gone.
LOST_AFTER: Final = 60

# Seconds. If two start times of one name differ by more, they are of different processes. A process
# reports its age, and the statement may be late by the time limit of a heartbeat.
_SAME_START: Final = 15

_WORKER: Final = bindparam("of_worker", type_=Text)


def beat(workers: Table) -> Select[Any]:
    """Stores that `of_worker` is alive, and deletes workers that were not seen for a day.

    The parameters are `age`, the seconds that its process has run; `is_first`, whether this is its
    first heartbeat; and `is_own_name`, whether no other process can have this name at the same
    time. Returns the new and the previous seen_at.
    """
    before = select(workers.c.seen_at).where(workers.c.worker == _WORKER).cte("before")
    before = before.prefix_with("MATERIALIZED")  # otherwise Citus might read it last
    is_old = workers.c.seen_at < func.now() - _seconds(86_400)
    swept = delete(workers).where(is_old, workers.c.worker != _WORKER).cte("swept")
    started_at = func.now() - as_interval(bindparam("age", type_=Double))
    statement = insert(workers).values({"worker": _WORKER, "started_at": started_at})
    new, row = statement.excluded, workers.c
    # After an earlier process of this name, such as a restarted container's, its tasks are lost.
    # Processes that share a name keep the earliest start. Times are subtracted from each other:
    # Citus refuses to subtract an interval here, because that depends on the time zone.
    started_apart = new.started_at - row.started_at > _seconds(_SAME_START)
    was_gone = new.seen_at - row.seen_at > _seconds(LOST_AFTER)
    is_another = and_(
        bindparam("is_first", type_=Boolean),
        case((bindparam("is_own_name", type_=Boolean), started_apart), else_=was_gone),
    )
    first = case((is_another, new.started_at), else_=func.least(row.started_at, new.started_at))
    stored = (
        statement.on_conflict_do_update(
            index_elements=["worker"], set_={"seen_at": new.seen_at, "started_at": first}
        )
        .returning(row.seen_at)
        .cte("stored")
    )
    # Not in RETURNING, where Citus does not support a subquery.
    old = select(before.c.seen_at).scalar_subquery()
    return select(stored.c.seen_at, old.label("before")).add_cte(before, swept)


def delete_worker(workers: Table) -> Select[Any]:
    """Deletes the row of `of_worker`, unless another process has renewed it since `seen_at`."""
    is_own = workers.c.seen_at == bindparam("was_seen_at", type_=workers.c.seen_at.type)
    gone = delete(workers).where(workers.c.worker == _WORKER, is_own).returning(workers.c.worker)
    return select(func.count()).select_from(gone.cte("gone"))


def select_workers(models: Models, workers: Table) -> Select[Any]:
    """All workers by name, as StoredWorker; alive if seen in the last `max_age` seconds."""
    status = models.status_table
    is_alive = workers.c.seen_at >= func.now() - as_interval(bindparam("max_age", type_=Double))
    running: ColumnElement[Any] = literal_column("0", Integer)
    columns = [workers.c.worker, workers.c.started_at, workers.c.seen_at, is_alive]
    if status is None:
        return select(*columns, running).order_by(workers.c.worker)
    begun = (
        select(status.c.worker, func.count().label("running"))
        .join(workers, workers.c.worker == status.c.worker)
        .where(is_started(models, status), status.c.updated_at >= workers.c.started_at)
        .group_by(status.c.worker)
        .subquery("begun")
    )
    return (
        select(*columns, func.coalesce(begun.c.running, running))
        .select_from(workers.outerjoin(begun, begun.c.worker == workers.c.worker))
        .order_by(workers.c.worker)
    )


def select_lost(models: Models, status: Table, workers: Table) -> Select[Any]:
    """At most `limit` lost tasks without a result, as StatusRow, the longest lost first.

    Tasks that are still in the queue are excluded.
    """
    results, queue = models.results_table, models.queue_table
    result = select(results.c.task_id).where(
        results.c.task_id == status.c.task_id, is_live(results)
    )
    names = dict.fromkeys((*StatusRow._fields, "updated_at"))
    lost = (
        select(*[status.c[name] for name in names])
        .select_from(with_worker(status, status, workers))
        .where(
            is_started(models, status),
            is_lost(status, workers),
            result.scalar_subquery().is_(None),
        )
        # Materialized, because Citus cannot join a distributed table with one that is not.
        .cte("lost")
        .prefix_with("MATERIALIZED")
    )
    statement = (
        select(*[lost.c[name] for name in StatusRow._fields])
        .order_by(lost.c.updated_at, lost.c.task_id)
        .limit(bindparam("limit", type_=Integer))
    )
    if queue is None:
        return statement
    queued = select(queue.c.task_id).where(queue.c.task_id == lost.c.task_id)
    # Not EXISTS, because PostgreSQL might read the whole queue.
    return statement.where(queued.scalar_subquery().is_(None))


def with_worker(source: Any, status: FromClause, workers: Table) -> Any:
    """The source, which contains the status, joined with the status's worker."""
    return source.outerjoin(workers, workers.c.worker == status.c.worker)


def is_started(models: Models, status: Table) -> ColumnElement[bool]:
    """Whether a task was started and has no later result."""
    results = models.results_table
    result = select(results.c.task_id).where(
        results.c.task_id == status.c.task_id, is_over(results, status)
    )
    # Not EXISTS, because PostgreSQL might read all results.
    is_without = result.scalar_subquery().is_(None)
    return and_(status.c.state == literal_column("'started'", Text), is_without)


def is_lost(status: FromClause, workers: Table) -> ColumnElement[bool]:
    """Whether a started task's worker is gone or was restarted, by the database's clock.

    A task without a known worker is never lost.
    """
    long_ago = func.now() - _seconds(LOST_AFTER)
    return case(
        (status.c.worker.is_(None), literal_column("false", Boolean)),
        (workers.c.worker.is_(None), status.c.updated_at < long_ago),
        else_=or_(workers.c.seen_at < long_ago, status.c.updated_at < workers.c.started_at),
    )


def _seconds(number: int) -> ColumnElement[timedelta]:
    return as_interval(literal_column(str(number), Integer))
