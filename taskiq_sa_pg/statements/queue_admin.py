"""The broker's queue as people look after it: counted, its parked tasks released or discarded.

`available_at` is never read as it is: it may be infinity, which not every driver can hold.
"""

from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Double,
    Executable,
    Integer,
    Select,
    Table,
    and_,
    bindparam,
    cast,
    delete,
    extract,
    func,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert

from taskiq_sa_pg.statements.delete import select_locked
from taskiq_sa_pg.statements.queue import NEVER, is_any_of
from taskiq_sa_pg.statements.rows import OldTask, ParkedTask
from taskiq_sa_pg.statements.select import is_asked_for
from taskiq_sa_pg.statements.shapes import Inserted, Upsert


def count_tasks(queue: Table) -> Select[Any]:
    """Counts the tasks of each queue and task name, as QueueCount. It reads the whole table."""
    is_due = queue.c.available_at <= func.now()
    is_later = (queue.c.available_at > func.now()) & (queue.c.available_at < NEVER)
    waited = func.now() - func.min(queue.c.available_at).filter(is_due)
    count, names = func.count(), (queue.c.queue_name, queue.c.task_name)
    return (
        select(
            *names,
            count.filter(is_due).label("waiting"),
            count.filter(is_later, queue.c.worker.is_(None)).label("delayed"),
            count.filter(is_later, queue.c.worker.is_not(None)).label("running"),
            count.filter(queue.c.available_at == NEVER).label("parked"),
            cast(extract("epoch", waited), Double).label("oldest_waiting"),
        )
        .group_by(*names)
        .order_by(*names)
    )


def count_parked(
    queue: Table, *, queue_name: str | None = None, task_name: str | None = None
) -> Select[Any]:
    """How many tasks are parked, in all or of a queue or a task name."""
    return select(func.count(queue.c.task_id)).where(*_is_parked(queue, queue_name, task_name))


def select_parked(
    queue: Table, *, queue_name: str | None = None, task_name: str | None = None
) -> Select[Any]:
    """The first `size` of the parked tasks, in the order in which they were sent."""
    # It was claimed once more to be parked.
    deliveries = (queue.c.deliveries - 1).label("deliveries")
    columns = {c.name: c for c in queue.c} | {"deliveries": deliveries}
    return (
        select(*[columns[name] for name in ParkedTask._fields])
        .where(*_is_parked(queue, queue_name, task_name))
        .order_by(queue.c.queued_at, queue.c.task_id)
        .limit(bindparam("size", type_=Integer))
    )


def release_parked(
    queue: Table,
    *,
    by_id: bool = False,
    queue_name: str | None = None,
    task_name: str | None = None,
) -> Executable:
    """Makes parked tasks due at once, as if they had just been sent.

    Those of the array `task_ids` if `by_id`, else the first `size`. Returns the task id and the
    queue's name of each.
    """
    found = _lock_parked(queue, by_id, queue_name, task_name)
    values = {
        "available_at": func.now(),
        "claim": queue.c.claim + 1,
        "deliveries": 0,
        "worker": null(),
    }
    returned = queue.c.task_id, queue.c.queue_name
    return update(queue).where(is_any_of(queue, found)).values(values).returning(*returned)


def discard_parked(
    queue: Table,
    *,
    by_id: bool = False,
    queue_name: str | None = None,
    task_name: str | None = None,
) -> Executable:
    """Deletes parked tasks; parameters and rows are those of release_parked()."""
    found = _lock_parked(queue, by_id, queue_name, task_name)
    returned = queue.c.task_id, queue.c.queue_name
    return delete(queue).where(is_any_of(queue, found)).returning(*returned)


def insert_old_tasks(queue: Table) -> Upsert:
    """Stores tasks of another queue, but for task ids that are there; returns the others."""

    def finish(statement: PostgresInsert, _: Inserted) -> Any:
        unless_there = statement.on_conflict_do_nothing(index_elements=["task_id"])
        return unless_there.returning(queue.c.task_id)

    return Upsert(queue, OldTask._fields, finish)


def select_queued(queue: Table) -> Select[Any]:
    """Those of the array `task_ids` that are in the queue."""
    return select(queue.c.task_id).where(is_asked_for(queue))


def _lock_parked(queue: Table, by_id: bool, queue_name: str | None, task_name: str | None) -> CTE:
    conditions = _is_parked(queue, queue_name, task_name)
    if by_id:
        return select_locked(queue, and_(*conditions, is_asked_for(queue))).cte("found")
    return (
        select_locked(queue, and_(*conditions)).limit(bindparam("size", type_=Integer)).cte("found")
    )


def _is_parked(
    queue: Table, queue_name: str | None, task_name: str | None
) -> list[ColumnElement[bool]]:
    conditions = [queue.c.available_at == NEVER]
    if queue_name is not None:
        conditions.append(queue.c.queue_name == queue_name)
    if task_name is not None:
        conditions.append(queue.c.task_name == task_name)
    return conditions
