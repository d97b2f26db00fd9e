"""What tasks are at, as SQLAlchemy Core statements; reads give StoredStatus."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Integer,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    column,
    exists,
    func,
    literal_column,
    null,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.rows import METADATA_COLUMNS, Features, StatusRow, StoredStatus
from taskiq_sa_pg.statements import is_live
from taskiq_sa_pg.upserts import Upsert, forget_statuses, has_metadata_columns, upsert_status

# Between task_id and state, which are made otherwise, and finished_at, which results alone have.
_COMMON: Final = StatusRow._fields[2:]


class StatusStatements:
    """The statements for what tasks are at, each built when it is first asked for.

    Args:
        models: The tables.
        features: What the tables have; without a status table, there is `select_statuses` alone.
    """

    def __init__(self, models: Models, features: Features) -> None:
        self._models = models
        self._features = features

    @cached_property
    def upsert(self) -> Upsert:
        """Stores statuses."""
        return upsert_status(self._status)

    @cached_property
    def delete(self) -> Select[Any]:
        """Forgets what tasks were at; takes arrays, as forget_statuses()."""
        return select(func.count()).add_cte(forget_statuses(self._status))

    @cached_property
    def select_statuses(self) -> Select[Any]:
        """What the `task_ids` are at."""
        return select_statuses(self._models, self._features)

    @cached_property
    def select_running(self) -> Select[Any]:
        """The tasks that are executed."""
        return select_running(self._models, self._status)

    @property
    def _status(self) -> Table:
        assert self._models.status_table is not None
        return self._models.status_table


def select_statuses(models: Models, features: Features) -> Select[Any]:
    """What the `task_ids` are at, by their results and the status table, whichever is later.

    Tasks of which nothing is known are left out.
    """
    results = models.results_table
    type_ = results.c.task_id.type
    asked = (
        func.unnest(_task_ids(models))
        .table_valued(column("task_id", type_))
        .render_derived(name="asked")
    )
    found = asked.outerjoin(results, results.c.task_id == asked.c.task_id)
    has_result = results.c.task_id.is_not(None)
    state = case(
        (~is_live(results), _text("expired")),
        (results.c.is_err, _text("failed")),
        else_=_text("succeeded"),
    )
    values = [state, *_columns_of_results(models, features)]
    finished_at: ColumnElement[Any] = results.c.finished_at
    status = models.status_table if features.has_status else None
    if status is None:
        return select(asked.c.task_id, *values, finished_at).select_from(found).where(has_result)
    is_unfinished = status.c.task_id.is_not(None) & ~and_(has_result, _is_over(results, status))
    names = ("state", *_COMMON)
    return (
        select(
            asked.c.task_id,
            *[
                case((is_unfinished, status.c[name]), else_=value)
                for name, value in zip(names, values, strict=True)
            ],
            case((~is_unfinished, finished_at)),
        )
        .select_from(found.outerjoin(status, status.c.task_id == asked.c.task_id))
        .where(has_result | status.c.task_id.is_not(None))
    )


def select_running(models: Models, status: Table) -> Select[Any]:
    """The tasks that are executed, the longest first; at most `limit`."""
    results = models.results_table
    result = select(results.c.task_id).where(
        results.c.task_id == status.c.task_id, _is_over(results, status)
    )
    columns: Sequence[ColumnElement[Any]] = [status.c[name] for name in StatusRow._fields]
    return (
        select(*columns, null().label(StoredStatus._fields[-1]))
        .where(status.c.state == _text("started"), ~exists(result))
        .order_by(status.c.started_at, status.c.task_id)
        .limit(bindparam("limit", type_=Integer))
    )


def _is_over(results: Table, status: Table) -> ColumnElement[bool]:
    """Whether the result is not older than what the status table says."""
    of_result = tuple_(results.c.attempt, results.c.finished_at)
    return of_result >= tuple_(status.c.attempt, status.c.updated_at)


def _columns_of_results(models: Models, features: Features) -> list[ColumnElement[Any]]:
    results = models.results_table
    has_metadata = features.has_metadata and has_metadata_columns(models)
    return [
        results.c[name] if has_metadata or name not in METADATA_COLUMNS else null()
        for name in _COMMON
    ]


def _task_ids(models: Models) -> BindParameter[Any]:
    return bindparam("task_ids", type_=ARRAY(models.results_table.c.task_id.type))


def _text(value: str) -> ColumnElement[str]:
    # Written out, because a parameter would have to be given each time.
    return literal_column(f"'{value}'", Text)
