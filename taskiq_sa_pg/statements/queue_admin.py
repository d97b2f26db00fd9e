"""Administration of the broker's queue: counts tasks, lists, releases and discards parked ones.

`available_at` is never returned: it may be infinity, which not every driver supports.
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

# None is any. As parameters, so that one statement serves all names.
_GIVEN_QUEUE: Final = bindparam("given_queue_name", type_=Text)
_GIVEN_TASK: Final = bindparam("given_task_name", type_=Text)


def count_tasks(queue: Table) -> Select[Any]:
    """Counts tasks by queue, priority, state and task name, as Tally.

    It counts at most the first `size` of each queue, priority and state, in the index's order; None
    counts all.
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
    """The number of parked tasks; the parameters are those of select_parked(), without `size`."""
    return select(func.count()).select_from(_find_parked(queue, ["task_id"]))


def select_parked(queue: Table) -> Select[Any]:
    """The first `size` parked tasks, in the order in which they were sent.

    They are in the queue `given_queue_name` and have the name `given_task_name`; None is any. At
    most `most` rows of each queue and priority are read.
    """
    found = _find_parked(queue, ParkedRow._fields, bindparam("most", type_=Integer))
    # To be parked, it was claimed once more.
    deliveries = (found.c.deliveries - 1).label("deliveries")
    columns = {c.name: c for c in found.c} | {"deliveries": deliveries}
    return (
        select(*[columns[name] for name in ParkedRow._fields])
        .order_by(found.c.queued_at, found.c.task_id)
        .limit(bindparam("size", type_=Integer))
    )


def release_parked(queue: Table, *, by_id: bool = False) -> Executable:
    """Makes parked tasks due now, as if they had just been sent.

    It releases those of the array `task_ids` if `by_id`, otherwise `size` tasks chosen as in
    select_parked(). Returns task id and queue name of each.
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
    """Stores tasks of another queue; returns the task ids that did not exist and were stored."""

    def finish(statement: PostgresInsert, _: Inserted) -> Any:
        unless_there = statement.on_conflict_do_nothing(index_elements=["task_id"])
        return unless_there.returning(queue.c.task_id)

    return Upsert(queue, OldTask._fields, finish)


def select_queued(queue: Table) -> Select[Any]:
    """The ids of the array `task_ids` that are in the queue."""
    return select(queue.c.task_id).where(is_asked_for(queue))


def _are_chosen(queue: Table, by_id: bool) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    # The row itself has to be parked still: another process may just have released it.
    if by_id:
        return is_asked_for(queue), _is_parked(queue)
    size = bindparam("size", type_=Integer)
    some = select(_find_parked(queue, ["task_id"], size).c.task_id).limit(size).cte("some")
    return is_any_of(queue, some), _is_parked(queue)


def _find_parked(
    queue: Table, names: Sequence[str], most: BindParameter[int] | None = None
) -> Subquery:
    """Columns of the parked tasks, of at most `most` for each queue and priority."""
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
    """The pairs of queue name and priority, of all queues or of one.

    The names are found one after the other in the index, which begins with queue name and priority
    (a loose index scan). So the cost does not depend on the number of tasks.
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
    # Not `=`, which would make the index's order useless: PostgreSQL might read the whole table.
    return queue.c.available_at >= NEVER


def _columns(queue: Table, names: Sequence[str]) -> list[ColumnElement[Any]]:
    return [queue.c[name] for name in names]
