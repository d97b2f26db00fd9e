"""What deletes rows: read once, forgotten, finished, expired or stale ones.

Pruning goes in slices. A slice is found through an index, holds a bounded number of rows, and
leaves out those that somebody else has locked: it waits for nobody, so nobody waits for it longer
than it takes.
"""

import uuid
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    CTE,
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Double,
    FromClause,
    Insert,
    Integer,
    Select,
    Table,
    Text,
    Uuid,
    any_,
    bindparam,
    case,
    cast,
    collate,
    delete,
    exists,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import insert

from taskiq_sa_pg.models import Models, as_interval
from taskiq_sa_pg.statements.rows import StoredResult
from taskiq_sa_pg.statements.select import is_asked_for, is_live, readable
from taskiq_sa_pg.statements.shapes import unnested

_TIME: Final = DateTime(timezone=True)
_FIRST_TIME: Final = literal_column("'-infinity'::timestamptz", _TIME)
_FIRST_TEXT: Final = literal_column("''", Text)
_SIZE: Final = bindparam("size", type_=Integer)
_MOST: Final = bindparam("most", type_=Integer)
_FIRST_UUID: Final = literal_column(f"'{uuid.UUID(int=0)}'::uuid", Uuid)


class Slice(NamedTuple):
    """What prune_results() or prune_stale() has done."""

    deleted: int
    last: Any  # where the next slice begins
    is_last: bool


def take_results(models: Models, *, is_tracked: bool) -> Select[Any]:
    """Deletes the results of the `task_ids` with their progress, and returns both, whole.

    Args:
        models: The tables.
        is_tracked: Whether statuses are deleted, too.

    Returns:
        The columns of the results, StoredResult's first, and then those of the progress, NULL
        where there was none; named as in taken_columns().
    """
    results, progress = models.results_table, models.progress_table
    found = select_locked(results, is_asked_for(results) & is_live(results)).cte("found")
    of_results, of_progress = taken_columns(models)
    taken = (
        delete(results)
        .where(results.c.task_id == found.c.task_id)
        .returning(*readable(results, of_results))
        .cte("taken")
    )
    ended = select_locked(progress, progress.c.task_id == taken.c.task_id).cte()
    with_it = (
        delete(progress)
        .where(progress.c.task_id == ended.c.task_id)
        .returning(*readable(progress, of_progress))
        .cte("with_it")
    )
    columns = [*taken.c, *(c.label(f"progress__{c.name}") for c in with_it.c)]
    both = taken.outerjoin(with_it, with_it.c.task_id == taken.c.task_id)
    statement = select(*columns).select_from(both)
    status = models.status_table if is_tracked else None
    if status is None:
        return statement
    return statement.add_cte(
        _deletion(status, select_locked(status, status.c.task_id == taken.c.task_id))
    )


def taken_columns(models: Models) -> tuple[list[str], list[str]]:
    """The columns that take_results() returns of the results and of the progress, by name."""
    first = StoredResult._fields
    rest = [name for name in _stored_columns(models.results_table) if name not in first]
    return [*first, *rest], _stored_columns(models.progress_table)


def _stored_columns(source: Table) -> list[str]:
    """Those that can be given a value, by name."""
    is_generated = {c for c in source.c if c.computed or (c.identity and c.identity.always)}
    return [c.name for c in source.c if c not in is_generated]


def put_back(source: Table) -> Insert:
    """Stores a row that take_results() has deleted, unless there is another one by now.

    Its parameters are called like the columns.
    """
    values = {
        c: cast(bindparam(c.name, type_=Text), c.type)
        if isinstance(c.type, JSON)
        else bindparam(c.name, type_=c.type)
        for c in map(source.c.__getitem__, _stored_columns(source))
    }
    return insert(source).values(values).on_conflict_do_nothing(index_elements=["task_id"])


def forget_results(models: Models) -> Select[Any]:
    """Deletes all that there is of the `task_ids`; returns how many results, expired ones too."""
    results = models.results_table
    found = select_locked(results, is_asked_for(results)).cte("found")
    gone = (
        delete(results)
        .where(results.c.task_id == found.c.task_id)
        .returning(results.c.task_id)
        .cte("gone")
    )
    count = select(func.count()).select_from(gone)
    # Nothing of the others before the results are gone: other statements lock them in this order.
    are_gone = count.scalar_subquery().is_not(None)
    return count.add_cte(
        *[
            _deletion(other, select_locked(other, is_asked_for(other) & are_gone))
            for other in models.other_tables
        ]
    )


def delete_statuses(status: Table) -> Select[Any]:
    """Deletes statuses of arrays `task_id`, `attempt` and `queued_at`, as delete_finished()."""
    finished = unnested([status.c.task_id, status.c.attempt, status.c.queued_at])
    return select(func.count()).add_cte(delete_finished(status, finished))


def delete_finished(status: Table, finished: FromClause) -> CTE:
    """Deletes the statuses of tasks, unless they are later, as a part of a statement.

    Args:
        status: The table.
        finished: Rows of task_id, attempt and queued_at; a status of a later attempt stays, and
            one of a message that was sent later.
    """
    is_over = (
        (status.c.task_id == finished.c.task_id)
        & (status.c.attempt <= finished.c.attempt)
        & (status.c.queued_at > finished.c.queued_at).is_not(true())
    )
    return _deletion(status, select_locked(status, is_over))


def _deletion(source: Table, task_ids: Select[Any]) -> CTE:
    doomed = task_ids.cte()
    return delete(source).where(source.c.task_id == doomed.c.task_id).cte()


def select_locked(source: Table, condition: ColumnElement[bool]) -> Select[Any]:
    """The ids of rows, which are locked in the order in which upserts lock theirs."""
    # Python's order: else the two could deadlock.
    task_id = source.c.task_id
    order = task_id if isinstance(task_id.type, Uuid) else collate(task_id, "C")
    return select(task_id).where(condition).order_by(order).with_for_update(of=source)


def prune_results(models: Models) -> Select[Any]:
    """Deletes expired results with their progress and status, the oldest first: a Slice.

    Takes `size` and `most`, of which the smaller is the most rows; `start`, an expires_at, or None
    to begin with the oldest: nothing is looked at twice, of which PostgreSQL would have to see that
    it is deleted; and `is_exclusive`, whether to do nothing while another exclusive one is at work.
    """
    results = models.results_table
    expires_at = results.c.expires_at
    most = func.least(_SIZE, _MOST, type_=Integer)
    expired = (
        select(results.c.task_id)
        .where(
            expires_at >= func.coalesce(bindparam("start", type_=_TIME), _FIRST_TIME),
            expires_at <= func.now(),
            _may_run(models),
            *[_is_free(other, results) for other in models.other_tables],
        )
        .order_by(expires_at)
        .limit(most)
        .with_for_update(of=results, skip_locked=True)
        .cte("expired")
    )
    gone = (
        delete(results)
        .where(results.c.task_id == _any_of(select(expired.c.task_id)))
        .returning(results.c.task_id, expires_at)
        .cte("gone")
    )
    count = func.count()
    done: list[ColumnElement[Any]] = [count, func.max(gone.c.expires_at), count < most]
    others = [_forget(other, gone) for other in models.other_tables]
    return select(*done).select_from(gone).add_cte(*others)


def _is_free(other: Table, results: Table) -> ColumnElement[bool]:
    """Whether a task's row in another table is now locked by us, or there is none.

    To wait for it would make others wait for the result that is locked already, and to leave it
    there alone would leave it for ever.
    """
    found = select(other.c.task_id).where(other.c.task_id == results.c.task_id)
    locked = found.with_for_update(of=other, skip_locked=True)
    # Not EXISTS, for which PostgreSQL may read all of the other table.
    return locked.scalar_subquery().is_not_distinct_from(found.scalar_subquery())


def _forget(other: Table, gone: CTE) -> CTE:
    ids = select_locked(other, other.c.task_id == _any_of(select(gone.c.task_id)))
    stale = ids.cte()
    return delete(other).where(other.c.task_id == _any_of(select(stale.c.task_id))).cte()


def prune_stale(models: Models, source: Table) -> Select[Any]:
    """Deletes old rows, of progress or status, of tasks without a result: a Slice.

    No index has their time, so it goes through all of them in the order of the task ids. Takes
    `size`, the rows to look at, `most`, those to delete, `seconds`, how old they have to be,
    `start`, a task id, or None to begin with the first, and `is_exclusive` as prune_results().
    """
    task_id = source.c.task_id
    first = _FIRST_UUID if isinstance(task_id.type, Uuid) else _FIRST_TEXT
    page = (
        select(task_id, source.c.updated_at)
        .where(
            task_id >= func.coalesce(bindparam("start", type_=task_id.type), first),
            _may_run(models),
        )
        .order_by(task_id)
        .limit(_SIZE)
        .cte("page")
    )
    old = select(page.c.task_id).where(_is_old(page.c.updated_at))
    stale = (
        select(task_id)
        .where(task_id == _any_of(old), _is_stale(models, source))
        .limit(_MOST)
        .with_for_update(of=source, skip_locked=True)
        .cte("stale")
    )
    gone = (
        delete(source)
        .where(task_id == _any_of(select(stale.c.task_id)))
        .returning(task_id)
        .cte("gone")
    )
    looked_at = select(func.count()).select_from(page).scalar_subquery()
    deleted = select(func.count()).select_from(gone).scalar_subquery()
    return select(
        deleted,
        select(page.c.task_id).order_by(page.c.task_id.desc()).limit(1).scalar_subquery(),
        (looked_at < _SIZE) & (deleted < _MOST),
    )


def count_expired(models: Models) -> Select[Any]:
    """How many results have expired."""
    expires_at = models.results_table.c.expires_at
    return select(func.count(expires_at)).where(expires_at <= func.now())


def count_stale(models: Models, source: Table) -> Select[Any]:
    """How many rows prune_stale() would delete, of `seconds`."""
    return select(func.count()).select_from(source).where(_is_stale(models, source))


def _is_stale(models: Models, source: Table) -> ColumnElement[bool]:
    results = models.results_table
    result = select(results.c.task_id).where(results.c.task_id == source.c.task_id)
    return _is_old(source.c.updated_at) & ~exists(result)


def _is_old(updated_at: ColumnElement[datetime]) -> ColumnElement[bool]:
    return updated_at <= func.now() - as_interval(bindparam("seconds", type_=Double))


def _any_of(task_ids: Select[Any]) -> ColumnElement[Any]:
    # As an array, of which PostgreSQL knows that it is small: it never reads the whole table.
    return any_(func.array(task_ids.scalar_subquery()))


def _may_run(models: Models) -> ColumnElement[bool]:
    # Without the schema, which one process may name and the next leave to the search_path.
    name = f"taskiq_sa_pg prune {models.config.table_name}"
    key = func.hashtextextended(name, 0, type_=BigInteger)
    has_lock = func.pg_try_advisory_xact_lock(key, type_=Boolean)
    is_exclusive = bindparam("is_exclusive", type_=Boolean)
    return select(case((is_exclusive, has_lock), else_=true())).scalar_subquery()
