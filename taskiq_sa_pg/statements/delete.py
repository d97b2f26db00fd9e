"""Deletes rows by task id: results that are read once or forgotten, and statuses of finished tasks.

No row is locked first, and all tables are filtered by the task ids. So Citus can run the statements
on distributed tables, and for one id on a single node. PostgreSQL locks the rows in the order in
which it finds them; overlapping statements may deadlock, and one of them is then retried.
"""

from typing import Any

from sqlalchemy import (
    CTE,
    JSON,
    ColumnElement,
    Delete,
    FromClause,
    Insert,
    Select,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StoredResult
from taskiq_sa_pg.statements.select import is_asked_for, is_live, readable
from taskiq_sa_pg.statements.shapes import unnested


def take_results(models: Models, *, is_tracked: bool) -> Select[Any]:
    """Deletes the results of the `task_ids` with their progress, and returns both completely.

    Args:
        models: The tables.
        is_tracked: Whether statuses are deleted as well.

    Returns:
        The columns of the results, StoredResult's first, then those of the progress, NULL if there
        was none; named as in taken_columns().
    """
    results, progress = models.results_table, models.progress_table
    of_results, of_progress = taken_columns(models)
    taken = (
        delete(results)
        .where(is_asked_for(results), is_live(results))
        .returning(*readable(results, of_results))
        .cte("taken")
    )
    ended = _delete_with(progress, taken).returning(*readable(progress, of_progress))
    with_it = ended.cte("with_it")
    columns = [*taken.c, *(c.label(f"progress__{c.name}") for c in with_it.c)]
    both = taken.outerjoin(with_it, with_it.c.task_id == taken.c.task_id)
    statement = select(*columns).select_from(both)
    status = models.status_table if is_tracked else None
    return statement if status is None else statement.add_cte(_delete_with(status, taken).cte())


def _delete_with(other: Table, taken: CTE) -> Delete:
    return delete(other).where(is_asked_for(other), other.c.task_id.in_(select(taken.c.task_id)))


def taken_columns(models: Models) -> tuple[list[str], list[str]]:
    """The names of the columns of results and of progress that take_results() returns."""
    first = StoredResult._fields
    rest = [name for name in _stored_columns(models.results_table) if name not in first]
    return [*first, *rest], _stored_columns(models.progress_table)


def _stored_columns(source: Table) -> list[str]:
    """The names of the columns that are not generated."""
    is_generated = {c for c in source.c if c.computed or (c.identity and c.identity.always)}
    return [c.name for c in source.c if c not in is_generated]


def put_back(source: Table) -> Insert:
    """Stores a row that take_results() has deleted, unless a new one exists by now.

    The parameters have the names of the columns.
    """
    values = {
        c: cast(bindparam(c.name, type_=Text), c.type)
        if isinstance(c.type, JSON)
        else bindparam(c.name, type_=c.type)
        for c in map(source.c.__getitem__, _stored_columns(source))
    }
    return insert(source).values(values).on_conflict_do_nothing(index_elements=["task_id"])


def forget_results(models: Models) -> Select[Any]:
    """Deletes all rows of the `task_ids`; returns the number of results, with expired ones."""
    results = models.results_table
    gone = delete(results).where(is_asked_for(results)).returning(results.c.task_id).cte("gone")
    count = select(func.count()).select_from(gone)
    # The other tables after the results, because other statements lock them in this order.
    are_gone = count.scalar_subquery().is_not(None)
    return count.add_cte(
        *[delete(other).where(is_asked_for(other), are_gone).cte() for other in models.other_tables]
    )


def delete_statuses(status: Table) -> Select[Any]:
    """Deletes statuses, as delete_finished(); by arrays `task_id`, `attempt` and `queued_at`."""
    finished = unnested([status.c.task_id, status.c.attempt, status.c.queued_at])
    is_given = status.c.task_id == any_(bindparam("task_id", type_=ARRAY(status.c.task_id.type)))
    gone = delete(status).where(is_given, _is_finished(status, finished)).cte()
    return select(func.count()).add_cte(gone)


def delete_finished(status: Table, finished: FromClause) -> CTE:
    """A CTE that deletes the statuses of finished tasks, unless they are later.

    Args:
        status: The table.
        finished: Rows of task_id, attempt and queued_at. A status of a later attempt, or of a
            message that was sent later, stays.
    """
    return delete(status).where(_is_finished(status, finished)).cte()


def delete_over(results: Table, status: Table) -> Delete:
    """Deletes the statuses of those `task_ids` that have a result, as delete_finished()."""
    # Both tables are filtered by the ids, so that Citus reads only the shards of these tasks.
    result = select(results.c.task_id).where(_is_finished(status, results), is_asked_for(results))
    return delete(status).where(is_asked_for(status), exists(result))


def _is_finished(status: Table, finished: FromClause) -> ColumnElement[bool]:
    is_sent_later = (status.c.queued_at > finished.c.queued_at).is_(true())
    is_same_task = status.c.task_id == finished.c.task_id
    return and_(is_same_task, status.c.attempt <= finished.c.attempt, ~is_sent_later)
