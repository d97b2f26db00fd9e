"""Prunes in slices: deletes expired results, and stale progress and statuses.

A slice is a range of an indexed column with a bounded number of rows. Its two statements run in one
transaction. The wait for rows that are locked by others is short.
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

# Shorter than PostgreSQL's deadlock_timeout, so that in a deadlock pruning is what fails.
_LOCK_TIMEOUT: Final = "500ms"

# The same on Citus nodes, to which it propagates only SET commands. Two texts, because each command
# has to be sent separately.
LIMIT_WAITING_ON_NODES: Final = (
    text("SET LOCAL citus.propagate_set_commands = 'local'"),
    text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"),
)


class Slice(NamedTuple):
    """A range of expires_at or of task ids.

    Attributes:
        start: The first value; None starts at the lowest.
        end: The first value after the slice; None ends at the highest.
        size: The most rows in it.
        most: The most rows that may be deleted; None for all.
    """

    start: Any
    end: Any
    size: int
    most: int | None = None

    @property
    def is_one_moment(self) -> bool:
        """Whether its first value alone has more rows than `size`; the slice has some of them."""
        return self.end is not None and self.start == self.end


def begin_slice(
    column: Column[Any], start: Any, size: int, *, lock: str | None = None
) -> Select[Any]:
    """Selects lock_timeout, whether the slice at `start` may be deleted, and where it ends.

    With a `lock`, it may be deleted if this transaction gets the advisory lock of that name. The
    statement also sets the transaction's lock_timeout.
    """
    beyond = select(column).where(*_from(column, start)).order_by(column).offset(size).limit(1)
    return select(
        func.set_config("lock_timeout", _LOCK_TIMEOUT, true()),
        true() if lock is None else try_lock(lock),
        beyond.scalar_subquery(),
    )


def try_lock(name: str) -> ColumnElement[bool]:
    """Tries to get an advisory lock until the end of the transaction; false if another holds it.

    Only for a SELECT without FROM: with a distributed table there, Citus would call the function on
    every node.
    """
    key = func.hashtextextended(f"taskiq_sa_pg {name}", 0, type_=BigInteger)
    return func.pg_try_advisory_xact_lock(key, type_=Boolean)


def prune_results(models: Models, part: Slice) -> Select[Any]:
    """Deletes the expired results of a slice with progress and status; returns their number."""
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
    """Deletes a slice's rows of progress or status that are older than `seconds`, without a result.

    There is no index on their time, so slices are ranges of task ids. Returns the number deleted.
    """
    task_id = source.c.task_id
    result = _select_result(models, source).scalar_subquery()
    # Not EXISTS, because PostgreSQL might read all results.
    stale = [*_within(task_id, part), _is_old(source.c.updated_at), result.is_(None)]
    if part.most is not None and part.most < part.size:
        stale.append(task_id == _any_of(select(task_id).where(*stale).limit(part.most)))
    gone = delete(source).where(*stale).returning(task_id).cte("gone")
    return select(func.count()).select_from(gone)


def count_expired(models: Models) -> Select[Any]:
    """The number of expired results."""
    expires_at = models.results_table.c.expires_at
    return select(func.count(expires_at)).where(expires_at <= func.now())


def count_stale(models: Models, source: Table) -> Select[Any]:
    """The number of rows that prune_stale() would delete for `seconds`."""
    is_stale = _is_old(source.c.updated_at) & ~exists(_select_result(models, source))
    return select(func.count()).select_from(source).where(is_stale)


def _from(column: Column[Any], start: Any) -> Iterator[ColumnElement[bool]]:
    if start is not None:
        # So PostgreSQL does not read the deleted rows before it again.
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
    # As an array, which the planner knows to be small: so it never reads the whole table.
    return any_(func.array(task_ids.scalar_subquery()))
