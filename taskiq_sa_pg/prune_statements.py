"""What deletes expired rows, a slice at a time, as SQLAlchemy Core statements.

A slice is found through an index, holds a bounded number of rows, and leaves out those that
somebody else has locked: it waits for nobody, so nobody waits for it longer than it takes.
"""

import uuid
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    DateTime,
    Double,
    Integer,
    Select,
    Table,
    Text,
    Uuid,
    any_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    select,
    true,
)

from taskiq_sa_pg.mixins import as_interval
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.rows import Features
from taskiq_sa_pg.statements import others_of
from taskiq_sa_pg.upserts import locked

_TIME: Final = DateTime(timezone=True)
_FIRST_TIME: Final = literal_column("'-infinity'::timestamptz", _TIME)
_FIRST_TEXT: Final = literal_column("''", Text)
_FIRST_UUID: Final = literal_column(f"'{uuid.UUID(int=0)}'::uuid", Uuid)


class ResultsSlice(NamedTuple):
    """What prune_results() has done."""

    deleted: int
    last: datetime | None  # where the next slice begins


class StaleSlice(NamedTuple):
    """What prune_stale() has done."""

    looked_at: int
    deleted: int
    last: Any  # where the next slice begins


class PruneStatements:
    """What deletes the expired rows of a results table and those that go with it.

    Each statement is built when it is first asked for.

    Args:
        models: The tables.
        features: What the tables have.
        is_exclusive: As of prune_results() and prune_stale().
    """

    def __init__(self, models: Models, features: Features, *, is_exclusive: bool) -> None:
        self._models = models
        self._others = others_of(models, features)
        self._is_exclusive = is_exclusive

    @cached_property
    def results(self) -> Select[Any]:
        """Deletes expired results with their progress and status; returns a ResultsSlice."""
        return prune_results(self._models, self._others, is_exclusive=self._is_exclusive)

    @cached_property
    def progress(self) -> Select[Any]:
        """Deletes progress of tasks that never finished; returns a StaleSlice."""
        return self._prune_stale(self._models.progress_table)

    @cached_property
    def statuses(self) -> Select[Any]:
        """The same of statuses, where there is a table of them."""
        assert self._models.status_table is not None
        return self._prune_stale(self._models.status_table)

    def _prune_stale(self, source: Table) -> Select[Any]:
        return prune_stale(self._models, source, is_exclusive=self._is_exclusive)


def prune_results(models: Models, others: Iterable[Table], *, is_exclusive: bool) -> Select[Any]:
    """Deletes expired results, the oldest first; returns a ResultsSlice.

    Takes `size`, the most rows, and `start`, an expires_at, or None to begin with the oldest:
    nothing is looked at twice, of which PostgreSQL would have to see that it is deleted.

    Args:
        models: The tables.
        others: Tables of which rows with the same task ids are deleted, too.
        is_exclusive: Whether it does nothing while another exclusive one is at work.
    """
    results = models.results_table
    expires_at = results.c.expires_at
    expired = (
        select(results.c.task_id)
        .where(
            expires_at >= func.coalesce(bindparam("start", type_=_TIME), _FIRST_TIME),
            expires_at <= func.now(),
            _may_run(models, is_exclusive),
        )
        .order_by(expires_at)
        .limit(bindparam("size", type_=Integer))
        .with_for_update(of=results, skip_locked=True)
        .cte("expired")
    )
    gone = (
        delete(results)
        .where(results.c.task_id == _any_of(select(expired.c.task_id)))
        .returning(results.c.task_id, expires_at)
        .cte("gone")
    )
    done: list[ColumnElement[Any]] = [func.count(), func.max(gone.c.expires_at)]
    return select(*done).select_from(gone).add_cte(*[_forget(other, gone) for other in others])


def _forget(other: Table, gone: CTE) -> CTE:
    ids = locked(other, other.c.task_id == _any_of(select(gone.c.task_id)))
    stale = ids.cte()
    return delete(other).where(other.c.task_id == _any_of(select(stale.c.task_id))).cte()


def prune_stale(models: Models, source: Table, *, is_exclusive: bool) -> Select[Any]:
    """Deletes old rows of tasks without a result; returns a StaleSlice.

    No index has their time, so it goes through all of them in the order of the task ids. Takes
    `size`, the rows to look at, `most`, those to delete, `seconds`, how old they have to be, and
    `start`, a task id, or None to begin with the first.

    Args:
        models: The tables.
        source: Where the rows are: progress or status.
        is_exclusive: Whether it does nothing while another exclusive one is at work.
    """
    task_id = source.c.task_id
    first = _FIRST_UUID if isinstance(task_id.type, Uuid) else _FIRST_TEXT
    page = (
        select(task_id, source.c.updated_at)
        .where(
            task_id >= func.coalesce(bindparam("start", type_=task_id.type), first),
            _may_run(models, is_exclusive),
        )
        .order_by(task_id)
        .limit(bindparam("size", type_=Integer))
        .cte("page")
    )
    old = select(page.c.task_id).where(_is_old(page.c.updated_at))
    stale = (
        select(task_id)
        .where(task_id == _any_of(old), _is_stale(models, source))
        .limit(bindparam("most", type_=Integer))
        .with_for_update(of=source, skip_locked=True)
        .cte("stale")
    )
    gone = (
        delete(source)
        .where(task_id == _any_of(select(stale.c.task_id)))
        .returning(task_id)
        .cte("gone")
    )
    return select(
        select(func.count()).select_from(page).scalar_subquery(),
        select(func.count()).select_from(gone).scalar_subquery(),
        select(page.c.task_id).order_by(page.c.task_id.desc()).limit(1).scalar_subquery(),
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


def _may_run(models: Models, is_exclusive: bool) -> ColumnElement[bool]:
    if not is_exclusive:
        return true()
    # Without the schema, which one process may name and the next leave to the search_path.
    key = func.hashtextextended(
        f"taskiq_sa_pg prune {models.config.table_name}", 0, type_=BigInteger
    )
    return select(func.pg_try_advisory_xact_lock(key)).scalar_subquery()
