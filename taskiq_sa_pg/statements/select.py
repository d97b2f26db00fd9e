"""Statements that read the tables; the parameter for task ids is `task_ids`.

JSON is returned as text, so that neither the driver's nor the application's JSON codec is used.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from sqlalchemy import (
    JSON,
    FromClause,
    Select,
    String,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    func,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.elements import ColumnElement

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StoredProgress, StoredResult

MAX_IDS: Final = 200


def in_slices(column_ids: list[Any]) -> Iterator[list[Any]]:
    """Splits ids into lists of at most MAX_IDS."""
    for start in range(0, len(column_ids), MAX_IDS):
        yield column_ids[start : start + MAX_IDS]


def select_ready(models: Models) -> Select[Any]:
    """The task ids that have a result."""
    results = models.results_table
    return select(results.c.task_id).where(is_asked_for(results), is_live(results))


def select_results(models: Models) -> Select[Any]:
    """The results of the task ids, as StoredResult."""
    results = models.results_table
    columns = readable(results, StoredResult._fields)
    return select(*columns).where(is_asked_for(results), is_live(results))


def select_progress(models: Models) -> Select[Any]:
    """The progress of the task ids, as StoredProgress."""
    progress = models.progress_table
    return select(*readable(progress, StoredProgress._fields)).where(is_asked_for(progress))


def select_having_progress(models: Models) -> Select[Any]:
    """The task ids that have progress."""
    progress = models.progress_table
    return select(progress.c.task_id).where(is_asked_for(progress))


def select_matching(
    models: Models, where: Sequence[ColumnElement[bool]], order_by: Sequence[ColumnElement[Any]]
) -> Select[Any]:
    """The results that meet all the conditions, as StoredResult."""
    results = models.results_table
    columns = readable(results, StoredResult._fields)
    return select(*columns).where(is_live(results), *where).order_by(*order_by)


def select_counts(models: Models) -> Select[Any]:
    """Counts of the results, as Counts."""
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
    """The number of tasks that have progress."""
    return select(func.count()).select_from(models.progress_table)


def notify() -> Select[Any]:
    """Sends notifications on `channel`: the `payloads`, texts of less than 8,000 bytes each.

    Returns one row for each; none on a read replica, which has no notifications.
    """
    payload = func.unnest(bindparam("payloads", type_=ARRAY(Text))).column_valued("payload")
    sent = func.pg_notify(bindparam("channel", type_=Text), payload).label("sent")
    return select(sent).where(~func.pg_is_in_recovery())


def readable(source: FromClause, names: Sequence[str]) -> list[ColumnElement[Any]]:
    """Columns in the form that the codec reads: JSON as text."""
    columns = [source.c[name] for name in names]
    return [cast(c, Text).label(c.name) if isinstance(c.type, JSON) else c for c in columns]


def is_live(results: FromClause) -> ColumnElement[bool]:
    """Whether a result has not expired; an expired one counts as missing."""
    expires_at = results.c.expires_at
    return expires_at.is_(None) | (expires_at > func.now())


def is_over(results: FromClause, status: FromClause) -> ColumnElement[bool]:
    """Whether a result is at least as new as the status of its task."""
    of_result = tuple_(results.c.attempt, results.c.finished_at)
    is_later = of_result >= tuple_(status.c.attempt, status.c.updated_at)
    # A status of a message that was sent later: the task id is used again.
    return is_later & (status.c.queued_at > results.c.queued_at).is_not(true())


def is_asked_for(source: Table) -> ColumnElement[bool]:
    """Whether a row has one of the `task_ids`, a list of column values."""
    task_id = source.c.task_id
    # asyncpg knows text[]. For varchar[] each connection would first ask the server what it is.
    sent = Text() if isinstance(task_id.type, String) else task_id.type
    return task_id == any_(bindparam("task_ids", type_=ARRAY(sent)))
