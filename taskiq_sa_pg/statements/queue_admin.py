"""The broker's queue as people look after it: counted, its parked tasks released or discarded.

`available_at` is never read as it is: it may be infinity, which not every driver can hold.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    CTE,
    BindParameter,
    ColumnElement,
    Double,
    Executable,
    Integer,
    Select,
    Subquery,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    extract,
    func,
    literal,
    null,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert

from taskiq_sa_pg.statements.queue import MAX_PRIORITY, NEVER, is_any_of
from taskiq_sa_pg.statements.rows import OldTask, ParkedRow
from taskiq_sa_pg.statements.select import is_asked_for
from taskiq_sa_pg.statements.shapes import Inserted, Upsert

_COUNTED: Final = ("task_name", "available_at", "worker")

# None is any. Parameters, so that there is one statement, however many names are asked for.
_GIVEN_QUEUE: Final = bindparam("given_queue_name", type_=Text)
_GIVEN_TASK: Final = bindparam("given_task_name", type_=Text)


def count_tasks(queue: Table) -> Select[Any]:
    """Counts tasks by queue, priority, state and task name, as Tallies.

    At most the first `size` of each queue, priority and state, by the index; None counts all.
    """
    lines, size = _lines(queue), bindparam("size", type_=Integer)
    available_at = queue.c.available_at
    states = {
        "waiting": available_at <= func.now(),
        "later": (available_at > func.now()) & (available_at < NEVER),
        "parked": _is_parked(queue),
    }
    found = union_all(
        *[
            select(literal(state, Text).label("state"), *_columns(queue, _COUNTED))
            .where(*_is_of(queue, lines), condition)
            .correlate(lines)
            .order_by(available_at)
            .limit(size)
            for state, condition in states.items()
        ]
    ).lateral("found")
    groups = lines.c.queue_name, lines.c.priority, found.c.state, found.c.task_name
    waited = func.now() - func.min(found.c.available_at).filter(found.c.state == "waiting")
    return (
        select(
            *groups,
            func.count().label("tasks"),
            func.count(found.c.worker).label("taken"),
            cast(extract("epoch", waited), Double).label("oldest"),
        )
        .select_from(lines.join(found, true()))
        .group_by(*groups)
        .order_by(lines.c.queue_name, found.c.task_name)
    )


def count_parked(queue: Table) -> Select[Any]:
    """How many tasks are parked; the parameters but `size` are those of select_parked()."""
    return select(func.count()).select_from(_find_parked(queue, ["task_id"]))


def select_parked(queue: Table) -> Select[Any]:
    """The first `size` of the parked tasks, in the order in which they were sent.

    Of those in the queue `given_queue_name` and of the task `given_task_name`; None is any. Of each
    queue and priority, `most` are looked at.
    """
    found = _find_parked(queue, ParkedRow._fields, bindparam("most", type_=Integer))
    # It was claimed once more to be parked.
    deliveries = (found.c.deliveries - 1).label("deliveries")
    columns = {c.name: c for c in found.c} | {"deliveries": deliveries}
    return (
        select(*[columns[name] for name in ParkedRow._fields])
        .order_by(found.c.queued_at, found.c.task_id)
        .limit(bindparam("size", type_=Integer))
    )


def release_parked(queue: Table, *, by_id: bool = False) -> Executable:
    """Makes parked tasks due at once, as if they had just been sent.

    Those of the array `task_ids` if `by_id`, else `size` of those of select_parked(). Returns the
    task id and the queue's name of each.
    """
    values = {
        "available_at": func.now(),
        "claim": queue.c.claim + 1,
        "deliveries": 0,
        "worker": null(),
    }
    returned = queue.c.task_id, queue.c.queue_name
    return update(queue).where(*_are_chosen(queue, by_id)).values(values).returning(*returned)


def discard_parked(queue: Table, *, by_id: bool = False) -> Executable:
    """Deletes parked tasks; parameters and rows are those of release_parked()."""
    returned = queue.c.task_id, queue.c.queue_name
    return delete(queue).where(*_are_chosen(queue, by_id)).returning(*returned)


def insert_old_tasks(queue: Table) -> Upsert:
    """Stores tasks of another queue, but for task ids that are there; returns the others."""

    def finish(statement: PostgresInsert, _: Inserted) -> Any:
        unless_there = statement.on_conflict_do_nothing(index_elements=["task_id"])
        return unless_there.returning(queue.c.task_id)

    return Upsert(queue, OldTask._fields, finish)


def select_queued(queue: Table) -> Select[Any]:
    """Those of the array `task_ids` that are in the queue."""
    return select(queue.c.task_id).where(is_asked_for(queue))


def _are_chosen(queue: Table, by_id: bool) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    # That it is parked is asked of the row itself, which another process may just have released.
    if by_id:
        return is_asked_for(queue), _is_parked(queue)
    size = bindparam("size", type_=Integer)
    some = select(_find_parked(queue, ["task_id"], size).c.task_id).limit(size).cte("some")
    return is_any_of(queue, some), _is_parked(queue)


def _find_parked(
    queue: Table, names: Sequence[str], most: BindParameter[int] | None = None
) -> Subquery:
    """Columns of the parked tasks, at most so many of each queue and priority."""
    lines = _lines(queue, _GIVEN_QUEUE)
    found = (
        select(*_columns(queue, names))
        .where(
            *_is_of(queue, lines),
            _is_parked(queue),
            or_(_GIVEN_TASK.is_(None), queue.c.task_name == _GIVEN_TASK),
        )
        .order_by(queue.c.available_at)
        .limit(most)
        .lateral("found")
    )
    return select(found).select_from(lines.join(found, true())).subquery("parked")


def _lines(queue: Table, queue_name: BindParameter[str] | None = None) -> CTE:
    """Each queue's name with each priority, or those of one queue.

    The names are found one after the other by the index, which begins with them and the priority:
    so nothing is read but what is asked for, however many tasks there are.
    """
    first = select(func.min(queue.c.queue_name).label("queue_name"))
    names = first.cte("names", recursive=True)
    following = select(func.min(queue.c.queue_name)).where(queue.c.queue_name > names.c.queue_name)
    names = names.union_all(
        select(following.correlate(names).scalar_subquery()).where(names.c.queue_name.is_not(None))
    )
    numbers = func.generate_series(0, MAX_PRIORITY).table_valued("priority").render_derived()
    lines = (
        select(names.c.queue_name, numbers.c.priority)
        .select_from(names.join(numbers, true()))
        .where(names.c.queue_name.is_not(None))
    )
    if queue_name is not None:
        lines = lines.where(or_(queue_name.is_(None), names.c.queue_name == queue_name))
    return lines.cte("lines")


def _is_of(queue: Table, lines: CTE) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return queue.c.queue_name == lines.c.queue_name, queue.c.priority == lines.c.priority


def _is_parked(queue: Table) -> ColumnElement[bool]:
    # Not `=`, with which the index's order is none, and PostgreSQL may read the whole table.
    return queue.c.available_at >= NEVER


def _columns(queue: Table, names: Sequence[str]) -> list[ColumnElement[Any]]:
    return [queue.c[name] for name in names]
