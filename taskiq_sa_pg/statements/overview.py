"""Statistics of the recent past; each statement has two time bounds, for the BRIN index."""

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    DateTime,
    Float,
    Integer,
    Interval,
    Select,
    Table,
    bindparam,
    cast,
    extract,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StatusRow
from taskiq_sa_pg.statements.select import is_live

_TIME = DateTime(timezone=True)
_NOTHING = literal_column("0", Integer)


class Bucket(NamedTuple):
    """Counts of the tasks that finished in a span of time, in the order of select_buckets()."""

    start: datetime | None  # None: the total of all buckets
    succeeded: int
    failed: int
    execution: list[float] | None  # p50 and p95, in seconds
    waiting: list[float] | None  # the same from queued_at to started_at; None if no task has both


def select_buckets(models: Models) -> Select[Any]:
    """Buckets of `width` from `since` to before `until`, and a total; empty ones are omitted.

    The parameters are two times and a timedelta that divides the span between them.
    """
    results = models.results_table
    since = bindparam("since", type_=_TIME)
    waiting = extract("epoch", results.c.started_at - results.c.queued_at)
    rows = (
        select(
            func.date_bin(bindparam("width", type_=Interval), results.c.finished_at, since).label(
                "start"
            ),
            results.c.is_err,
            results.c.execution_time,
            cast(waiting, Float).label("waiting"),
        )
        .where(
            results.c.finished_at >= since,
            results.c.finished_at < bindparam("until", type_=_TIME),
            is_live(results),
        )
        # Citus does not support ROLLUP of distributed rows; OFFSET makes it fetch them first.
        .offset(_NOTHING)
        .subquery()
    )
    shares = literal_column("'{0.5,0.95}'::float8[]", ARRAY(Float))

    def percentiles(name: str) -> Any:
        return func.percentile_cont(shares, type_=ARRAY(Float)).within_group(rows.c[name])

    return select(
        rows.c.start,
        func.count().filter(~rows.c.is_err),
        func.count().filter(rows.c.is_err),
        percentiles("execution_time"),
        percentiles("waiting"),
    ).group_by(func.rollup(rows.c.start))


def select_oldest_queued(status: Table) -> Select[Any]:
    """The `limit` tasks that have waited longest for a worker, as StatusRow."""
    return (
        select(*[status.c[name] for name in StatusRow._fields])
        .where(status.c.state == literal_column("'queued'"), status.c.queued_at.is_not(None))
        .order_by(status.c.queued_at, status.c.task_id)
        .limit(bindparam("limit", type_=Integer))
    )


def select_nothing() -> Select[Any]:
    """A query that every PostgreSQL can answer."""
    return select(literal_column("1", Integer))
