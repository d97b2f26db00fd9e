"""Rows as the parameters of a statement: one for each column of a row, or of many rows an array.

JSON travels as text, so that neither the driver's nor the application's JSON codec has a say in it.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from math import isqrt
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    Column,
    Double,
    Enum,
    FromClause,
    String,
    Table,
    Text,
    bindparam,
    cast,
    func,
    select,
    types,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, Insert, insert
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeDecorator, TypeEngine

from taskiq_sa_pg.mixins import as_interval

# They travel as seconds since 1970, which asyncpg encodes at a third of what a datetime takes.
_TIMES: Final = frozenset({"queued_at", "started_at"})

# In these columns rows differ; in the others those of a batch are likely to have the same.
_DIFFERING: Final = _TIMES | {"task_id", "return_value", "execution_time", "meta"}

# Arrays of fewer would cost more than they spare.
_MIN_WIDTH: Final = 3

# The parameter for what all rows have in a column is called like the column, and this.
_OF_ALL: Final = "__of_all"

NOTHING: Final[Mapping[str, Column[Any]]] = MappingProxyType({})


def shared_fields(fields: Sequence[str]) -> frozenset[str]:
    """Those in which the rows of a batch are likely to have the same."""
    return frozenset(fields) - _DIFFERING


def arrays_of(names: Sequence[str], rows: Sequence[Any]) -> dict[str, Any]:
    """The parameters of a statement for several rows; of the rows, the first columns."""
    columns = columns_of(names, rows)
    return as_arrays(columns, common_in(columns))


def columns_of(names: Sequence[str], rows: Sequence[Any]) -> dict[str, Any]:
    """An array for each of the rows' first columns, by these names."""
    return dict(zip(names, zip(*rows, strict=True), strict=False))


def common_in(columns: Mapping[str, Any]) -> dict[str, Any]:
    """What all rows have, where they have the same."""
    return {
        name: values[0]
        for name, values in columns.items()
        if name not in _DIFFERING and values.count(values[0]) == len(values)
    }


def as_arrays(columns: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of insert_unnested() and of or_of_all(); what is common goes once."""
    # unnest fills an array that is too short up with NULLs, and those stand for it.
    arrays = {name: () if name in common else _nested(values) for name, values in columns.items()}
    names = columns.keys() - _DIFFERING
    return arrays | {name + _OF_ALL: common.get(name) for name in names}


def as_alike(
    columns: Mapping[str, Any], common: Mapping[str, Any], shared: Collection[str]
) -> dict[str, Any]:
    """The parameters of insert_alike()."""
    return {
        name: common[name] if name in shared else _nested(values)
        for name, values in columns.items()
    }


def _nested(values: Sequence[Any]) -> Sequence[Any]:
    """An array of arrays where there are many values, the last array filled up with NULLs.

    Of every element asyncpg asks whether it is an array itself, which takes longer than to encode
    it; but within arrays, only of those in the first. unnest() takes both alike.
    """
    width = isqrt(len(values))
    if width < _MIN_WIDTH:
        return values
    return list(map(list, zip_longest(*[iter(values)] * width)))


def insert_one(
    target: Table, names: Sequence[str], extra: Mapping[str, Column[Any]] = NOTHING
) -> Insert:
    """Inserts a row; a parameter is called like its column, one of `extra` as that says."""
    columns = [target.c[name] for name in names]
    values = {c: _as_stored(_parameter(c), c) for c in columns}
    values.update({c: bindparam(name, type_=c.type) for name, c in extra.items()})
    return insert(target).values(values)


def insert_unnested(
    target: Table, names: Sequence[str], extra: Mapping[str, Column[Any]] = NOTHING
) -> Insert:
    """Inserts the rows of as_arrays()."""
    columns = [target.c[name] for name in names]
    rows = unnested(columns, "rows", extra)
    values = [_as_stored(or_of_all(rows.c[c.name], c), c) for c in columns]
    return _insert_from(target, names, values, rows, extra)


def insert_alike(
    target: Table,
    names: Sequence[str],
    shared: frozenset[str],
    extra: Mapping[str, Column[Any]] = NOTHING,
) -> Insert:
    """Inserts rows that have the same in the `shared` columns, which goes in place of an array."""
    columns = [target.c[name] for name in names]
    rows = unnested([c for c in columns if c.name not in shared], "rows", extra)
    values = [
        _computed_once(c) if c.name in shared else _as_stored(rows.c[c.name], c) for c in columns
    ]
    return _insert_from(target, names, values, rows, extra)


def _insert_from(
    target: Table,
    names: Sequence[str],
    values: Sequence[ColumnElement[Any]],
    rows: FromClause,
    extra: Mapping[str, Column[Any]],
) -> Insert:
    filled = [*names, *[c.key for c in extra.values()]]
    selected = select(*values, *[rows.c[name] for name in extra])
    # Not what fills the arrays up.
    return insert(target).from_select(filled, selected.where(rows.c.task_id.is_not(None)))


def unnested(
    columns: Sequence[Column[Any]], name: str, extra: Mapping[str, Column[Any]] = NOTHING
) -> FromClause:
    """Rows from one array a column, which the parameters are called like.

    What fills up arrays of arrays makes rows of NULLs.
    """
    # Not FROM unnest(...), whose rows PostgreSQL first puts into a store, to read them from there.
    return select(
        *[_unnest(c.name, ARRAY(wire_type(c)), wire_type(c)) for c in columns],
        # With its dimensions, because a value of JSON may be a list itself.
        *[_unnest(name, ARRAY(_item_type(c), dimensions=1), c.type) for name, c in extra.items()],
    ).subquery(name)


def _unnest(name: str, array: ARRAY[Any], item: TypeEngine[Any]) -> ColumnElement[Any]:
    return func.unnest(bindparam(name, type_=array), type_=item).label(name)


def can_be_unnested(target: Table, extra: Mapping[str, Column[Any]] = NOTHING) -> bool:
    """Whether several rows can be stored by one statement."""
    filled = set(extra.values())
    # SQLAlchemy calls a Python function that is a column's default once for a statement.
    return all(map(_fits_an_array, filled)) and not any(
        c.default is not None and c.default.is_callable for c in target.c if c not in filled
    )


def _fits_an_array(stored: Column[Any]) -> bool:
    wire = stored.type.impl_instance if isinstance(stored.type, TypeDecorator) else stored.type
    if isinstance(wire, types.ARRAY):  # unnest would take it apart, too
        return False
    if wire is not stored.type and getattr(wire, "length", None):  # see _item_type()
        return False
    return stored.type.bind_expression(bindparam(None, type_=stored.type)) is None


def _item_type(stored: Column[Any]) -> TypeEngine[Any]:
    item = stored.type
    if isinstance(item, String) and not isinstance(item, Enum) and item.length is not None:
        # The array is cast to its type, and PostgreSQL cuts in silence what is cast to VARCHAR(8).
        item = item.copy()
        item.length = None
    return item


def wire_type(stored: Column[Any]) -> TypeEngine[Any]:
    """The type as which a column's values travel."""
    if stored.name == "expires_at" or stored.name in _TIMES:
        return Double()
    return Text() if isinstance(stored.type, JSONB) else stored.type


def or_of_all(value: ColumnElement[Any], stored: Column[Any]) -> ColumnElement[Any]:
    """A column of unnested(), or what all rows have in it."""
    if stored.name in _DIFFERING:
        return value
    of_all = bindparam(stored.name + _OF_ALL, type_=wire_type(stored))
    return func.coalesce(value, of_all)


def _computed_once(stored: Column[Any]) -> ColumnElement[Any]:
    parameter = _parameter(stored)
    value = _as_stored(parameter, stored)
    # What a subquery has, PostgreSQL computes once, and all else for every row.
    return value if value is parameter else select(value).scalar_subquery()


def _parameter(stored: Column[Any]) -> ColumnElement[Any]:
    return bindparam(stored.name, type_=wire_type(stored))


def _as_stored(value: ColumnElement[Any], stored: Column[Any]) -> ColumnElement[Any]:
    if stored.name == "expires_at":
        return func.now() + as_interval(value)
    if stored.name in _TIMES:
        return func.to_timestamp(value)
    return cast(value, JSONB) if isinstance(stored.type, JSONB) else value
