"""What people ask of the tables, as SQLAlchemy Core statements."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Select, bindparam, func, select

from taskiq_sa_pg.catalogue import find_relations
from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.rows import METADATA_COLUMNS, StoredResult
from taskiq_sa_pg.statements import is_live, readable


class Details(NamedTuple):
    """One result as select_details() returns it: what reading needs, and what people ask."""

    stored: StoredResult
    traceback: str | None
    task_name: str | None
    attempt: int
    finished_at: datetime
    expires_at: datetime | None
    # Of a table that has METADATA_COLUMNS; JSON as text.
    args: str | None = None
    kwargs: str | None = None
    worker: str | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None

    @classmethod
    def of(cls, row: Sequence[Any]) -> "Details":
        """The details in a row."""
        width = len(StoredResult._fields)
        return cls(StoredResult._make(row[:width]), *row[width:])


class Listed(NamedTuple):
    """One line of a list of results, as select_list() returns it."""

    task_id: Any
    is_err: bool
    error_type: str | None
    task_name: str | None
    execution_time: float
    attempt: int
    finished_at: datetime


class Counts(NamedTuple):
    """The results table in figures, as select_counts() returns it; all but `expired` are live."""

    results: int
    failures: int
    expired: int
    oldest: datetime | None
    newest: datetime | None


def select_details(models: Models, *, has_metadata: bool = True) -> Select[Any]:
    """The result of the task `task_id`, as Details; with METADATA_COLUMNS or without."""
    results = models.results_table
    names = [*StoredResult._fields, *Details._fields[1:]]
    if not has_metadata:
        names = [name for name in names if name not in METADATA_COLUMNS]
    task_id = results.c.task_id
    return select(*readable(results, names)).where(
        task_id == bindparam("task_id", type_=task_id.type), is_live(results)
    )


def select_list(
    models: Models,
    *,
    is_err: bool | None = None,
    since: datetime | None = None,
    task_name: str | None = None,
    limit: int,
) -> Select[Any]:
    """The latest results first, as Listed.

    Args:
        models: The tables.
        is_err: Failures alone, or successes alone; None for both.
        since: Not those that finished before.
        task_name: Those of one task.
        limit: How many at most.
    """
    results = models.results_table
    listed = select(*[results.c[name] for name in Listed._fields]).where(is_live(results))
    if is_err is not None:
        listed = listed.where(results.c.is_err.is_(is_err))
    if since is not None:
        listed = listed.where(results.c.finished_at >= since)
    if task_name is not None:
        listed = listed.where(results.c.task_name == task_name)
    return listed.order_by(results.c.finished_at.desc(), results.c.task_id).limit(limit)


def select_matching(
    models: Models, where: Sequence[ColumnElement[bool]], order_by: Sequence[ColumnElement[Any]]
) -> Select[Any]:
    """The results that meet all the conditions, as StoredResult."""
    results = models.results_table
    columns = readable(results, StoredResult._fields)
    return select(*columns).where(is_live(results), *where).order_by(*order_by)


def select_counts(models: Models) -> Select[Any]:
    """The results in figures, as Counts."""
    results = models.results_table
    live = is_live(results)
    counts: list[ColumnElement[Any]] = [
        func.count().filter(live),
        func.count().filter(results.c.is_err, live),
        func.count().filter(~live),
        func.min(results.c.finished_at).filter(live),
        func.max(results.c.finished_at).filter(live),
    ]
    return select(*counts).select_from(results)


def count_progress(models: Models) -> Select[Any]:
    """How many tasks have progress."""
    return select(func.count()).select_from(models.progress_table)


def select_sizes(config: TableConfig) -> Select[Any]:
    """Name and bytes, with indexes and TOAST, of each of the tables that exists."""
    classes, found = find_relations(config.table_names, config.schema)
    size = func.pg_total_relation_size(classes.c.oid, type_=BigInteger)
    return found.with_only_columns(classes.c.relname, size).order_by(classes.c.relname)
