"""Selects finished tasks, the latest first, in pages: as StoredRecord, without payloads.

The only index on time is a BRIN index, which is not ordered. So a page is searched in slices of
time, and each slice is sorted separately.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    DateTime,
    Integer,
    Select,
    Text,
    and_,
    cast,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.elements import ColumnElement

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements.rows import StoredDetails, StoredRecord, StoredResult
from taskiq_sa_pg.statements.select import is_asked_for, is_live, readable

_TIME: Final = DateTime(timezone=True)

# A value in a JSON column. Numbers compare as in SQL: 1 equals 1.0.
Scalar = str | float | bool | None

# The columns of a payload that are not in a record.
_PAYLOAD: Final = ("return_value", "error", "log")


class Span(NamedTuple):
    """A slice of time without its end; with `before_id`, also rows at the end with a lower task id.

    Rows of the same instant are ordered by task id, in the column's collation.
    """

    start: datetime
    end: datetime
    before_id: Any = None


def begin_search(statement_timeout: float) -> Select[Any]:
    """Sets the transaction's statement_timeout, in seconds, and selects the database's clock."""
    limit = f"{max(statement_timeout * 1000, 1):.0f}ms"
    set_config = func.set_config("statement_timeout", limit, true())
    return select(func.now(), set_config.label("statement_timeout"))


def select_records(
    models: Models, conditions: Sequence[ColumnElement[bool]], span: Span, limit: int
) -> Select[Any]:
    """The results of one slice of time that meet all the conditions, as StoredRecord."""
    results = models.results_table
    at, task_id = results.c.finished_at, results.c.task_id
    end = literal(span.end, _TIME)
    is_before = at < end
    if span.before_id is not None:
        # Two conditions, because BRIN does not support row comparisons.
        before_id = literal(span.before_id, task_id.type)
        is_before = and_(at <= end, or_(at < end, task_id < before_id))
    columns = [results.c[name] for name in StoredRecord._fields]
    page = (
        select(*columns)
        .where(at >= literal(span.start, _TIME), is_before, is_live(results), *conditions)
        .order_by(at.desc(), task_id.desc())
        .limit(literal(limit, Integer))
        .subquery("page")
    )
    # JSON is cast to text only for the page, not for everything that is sorted.
    order = page.c.finished_at.desc(), page.c.task_id.desc()
    return select(*readable(page, StoredRecord._fields)).order_by(*order)


def select_details(models: Models, *, with_payload: bool) -> Select[Any]:
    """All columns of the `task_ids`: StoredRecord, StoredDetails and, if wanted, the payload."""
    results = models.results_table
    names = [*StoredRecord._fields, *StoredDetails._fields]
    if with_payload:
        names += [name for name in StoredResult._fields if name in _PAYLOAD]
    return select(*readable(results, names)).where(is_asked_for(results), is_live(results))


def has_outcome(models: Models, *, is_err: bool) -> ColumnElement[bool]:
    """Whether a result is a failure (`is_err`) or a success."""
    return models.results_table.c.is_err.is_(is_err)


def has_text(models: Models, column: str, text: str) -> ColumnElement[bool]:
    """Whether a column equals this text."""
    return models.results_table.c[column] == literal(text, Text)


def has_label(models: Models, name: str, values: Sequence[Scalar]) -> ColumnElement[bool]:
    """Whether a label has one of these values."""
    return _contains_one(models.results_table.c.labels, ({name: value} for value in values))


def has_argument(models: Models, key: str | int, values: Sequence[Scalar]) -> ColumnElement[bool]:
    """Whether the recorded argument of a name or position has one of these values."""
    results = models.results_table
    if isinstance(key, str):
        return _contains_one(results.c.kwargs, ({key: value} for value in values))
    argument = results.c.args.op("->", return_type=JSONB())(literal(key, Integer))
    return argument.in_([_document(value) for value in values])


def has_any_argument(models: Models, values: Sequence[Scalar]) -> ColumnElement[bool]:
    """Whether one of the recorded arguments has one of these values."""
    results = models.results_table
    each = func.jsonb_path_query(results.c.kwargs, literal_column("'$.*'::jsonpath"))
    argument = each.column_valued("argument")
    is_same = argument.in_([_document(value) for value in values])
    in_kwargs = exists(select(argument).where(is_same))
    return or_(_contains_one(results.c.args, ([value] for value in values)), in_kwargs)


def _contains_one(
    column: ColumnElement[Any], documents: Iterable[Mapping[str, Scalar] | list[Scalar]]
) -> ColumnElement[bool]:
    # `@>` can use a GIN index on the column, if the application has created one.
    return or_(*[column.op("@>", is_comparison=True)(_document(each)) for each in documents])


def _document(value: Any) -> ColumnElement[Any]:
    return cast(literal(json.dumps(value), Text), JSONB)
