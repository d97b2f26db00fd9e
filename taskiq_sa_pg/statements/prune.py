"""What prunes: deletes expired results, and stale progress and statuses, in slices.

A slice is a range of a column that has an index, and holds a bounded number of rows. Its two
statements run in one transaction. Whoever else has locked one of its rows is waited for shortly.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    Double,
    Select,
    Table,
    any_,
    bindparam,
    delete,
    exists,
    func,
    select,
    text,
    true,
)

from taskiq_sa_pg.models import Models, as_interval

# Shorter than PostgreSQL's deadlock_timeout, so that of two that wait for each other we give way.
_LOCK_TIMEOUT: Final = "500ms"

# The same on the nodes to which Citus sends what the transaction does next: of settings, it passes
# on those of SET alone. Two, because each has to be a command of its own.
LIMIT_WAITING_ON_NODES: Final = (
    text("SET LOCAL citus.propagate_set_commands = 'local'"),
    text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"),
)


class Slice(NamedTuple):
    """Where a slice begins and ends, by expires_at or by task id.

    Attributes:
        start: Its first value; None if there is nothing before.
        end: The first value behind it; None if there is nothing behind.
        size: How many rows it has at most.
        most: How many of them may be deleted; None for all.
    """

    start: Any
    end: Any
    size: int
    most: int | None = None

    @property
    def is_one_moment(self) -> bool:
        """Whether there are more rows of its first value than it may have: it has some of them."""
        return self.end is not None and self.start == self.end


def begin_slice(
    column: Column[Any], start: Any, size: int, *, lock: str | None = None
) -> Select[Any]:
    """Where the slice that begins at `start` ends, and whether it may be deleted.

    With a `lock`, it may if no other transaction has the advisory lock of that name, until this one
    ends. Also limits how long the transaction waits for locked rows.
    """
    beyond = select(column).where(*_from(column, start)).order_by(column).offset(size).limit(1)
    return select(
        func.set_config("lock_timeout", _LOCK_TIMEOUT, true()),
        true() if lock is None else try_lock(lock),
        beyond.scalar_subquery(),
    )


def try_lock(name: str) -> ColumnElement[bool]:
    """Whether this transaction has an advisory lock now, until it ends.

    For a SELECT without a FROM of its own: of one that has a distributed table there, Citus would
    call the function on every node.
    """
    key = func.hashtextextended(f"taskiq_sa_pg {name}", 0, type_=BigInteger)
    return func.pg_try_advisory_xact_lock(key, type_=Boolean)


def prune_results(models: Models, part: Slice) -> Select[Any]:
    """Deletes the expired results of a slice with their progress and status; returns how many."""
    results = models.results_table
    task_id, expires_at = results.c.task_id, results.c.expires_at
    expired = [*_within(expires_at, part), expires_at <= func.now()]
    if part.is_one_moment:
        expired.append(task_id == _any_of(select(task_id).where(*expired).limit(part.size)))
    gone = delete(results).where(*expired).returning(task_id).cte("gone")
    others = [
        delete(other).where(other.c.task_id == _any_of(select(gone.c.task_id))).cte()
        for other in models.other_tables
    ]
    return select(func.count()).select_from(gone).add_cte(*others)


def prune_stale(models: Models, source: Table, part: Slice) -> Select[Any]:
    """Deletes old rows of a slice of progress or status, of tasks without a result.

    No index has their time, so slices go by the task id. Takes `seconds`, how old they have to be;
    returns how many were deleted.
    """
    task_id = source.c.task_id
    result = _select_result(models, source).scalar_subquery()
    # Not EXISTS, for which PostgreSQL may read all of the results.
    stale = [*_within(task_id, part), _is_old(source.c.updated_at), result.is_(None)]
    if part.most is not None and part.most < part.size:
        stale.append(task_id == _any_of(select(task_id).where(*stale).limit(part.most)))
    gone = delete(source).where(*stale).returning(task_id).cte("gone")
    return select(func.count()).select_from(gone)


def count_expired(models: Models) -> Select[Any]:
    """How many results have expired."""
    expires_at = models.results_table.c.expires_at
    return select(func.count(expires_at)).where(expires_at <= func.now())


def count_stale(models: Models, source: Table) -> Select[Any]:
    """How many rows prune_stale() would delete, of `seconds`."""
    is_stale = _is_old(source.c.updated_at) & ~exists(_select_result(models, source))
    return select(func.count()).select_from(source).where(is_stale)


def _from(column: Column[Any], start: Any) -> Iterator[ColumnElement[bool]]:
    if start is not None:
        # Deleted rows before it, which PostgreSQL would have to look at, are not looked at again.
        yield column >= bindparam("start", start, type_=column.type)
    if isinstance(column.type, DateTime):
        yield column <= func.now()


def _within(column: Column[Any], part: Slice) -> Iterator[ColumnElement[bool]]:
    yield from _from(column, part.start)
    if part.is_one_moment:
        yield column <= bindparam("end", part.end, type_=column.type)
    elif part.end is not None:
        yield column < bindparam("end", part.end, type_=column.type)


def _select_result(models: Models, source: Table) -> Select[Any]:
    results = models.results_table
    return select(results.c.task_id).where(results.c.task_id == source.c.task_id)


def _is_old(updated_at: ColumnElement[datetime]) -> ColumnElement[bool]:
    return updated_at <= func.now() - as_interval(bindparam("seconds", type_=Double))


def _any_of(task_ids: Select[Any]) -> ColumnElement[Any]:
    # As an array, of which PostgreSQL knows that it is small: it never reads the whole table.
    return any_(func.array(task_ids.scalar_subquery()))
