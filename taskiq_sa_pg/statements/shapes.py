"""Builds INSERTs for rows: with VALUES, or with one array for each column.

JSON is sent as text, so that neither the driver's nor the application's JSON codec is used.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import starmap
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    Column,
    Double,
    Executable,
    FromClause,
    Insert,
    Table,
    Text,
    bindparam,
    cast,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.models import as_interval

# Times that are sent as seconds from now, by the database's clock.
_FROM_NOW: Final = frozenset({"expires_at", "available_at"})

# The most rows of a statement with VALUES. Each number of rows is a different text, of which a
# connection keeps the last hundred prepared: with up to 500 rows, that took 370 MB per connection.
_MOST_VALUES: Final = 64

NOTHING: Final[Mapping[str, Column[Any]]] = MappingProxyType({})

# A statement and its parameters; for several rows with VALUES, the parameters of each row.
Call = tuple[Executable, dict[str, Any] | list[dict[str, Any]]]

# Returns columns of the inserted rows, for other parts of the statement; None if the statement can
# have no other parts.
Inserted = Callable[[Sequence[Column[Any]]], FromClause] | None


class Upsert:
    """Stores rows: a single one with plain parameters, several with an array for each column.

    VALUES are used instead of arrays in three cases: for rows with values of the application's
    additional columns; for a table with defaults that SQLAlchemy computes for each row; and for a
    table that Citus distributes, because it would send arrays to one node first. The number of rows
    in a statement with VALUES is bounded.

    Args:
        target: The table.
        fields: The columns to store, which are the fields of a row.
        finish: Adds the ON CONFLICT clause.
        extra: The application's additional columns to store, by parameter.
        then: A statement to run after rows were stored with VALUES, with their `task_ids`.
        by_values: Whether all rows use VALUES, because Citus distributes the table.
    """

    def __init__(
        self,
        target: Table,
        fields: Sequence[str],
        finish: Callable[[PostgresInsert, Inserted], Insert],
        extra: Mapping[str, Column[Any]] = NOTHING,
        then: Executable | None = None,
        *,
        by_values: bool = False,
    ) -> None:
        self._target = target
        self._fields = tuple(fields)
        self._finish = finish
        self._extra = extra
        self._then = then
        self._is_distributed = by_values
        self._goes_by_values = by_values or _has_computed_default(target)

    def of(self, rows: Sequence[Any]) -> list[Call]:
        """The statements that store named tuples with distinct task ids."""
        if self._goes_by_values:
            return self.of_mappings([row._asdict() for row in rows])
        if len(rows) == 1:
            return [(self._by_row, rows[0]._asdict())]
        # Overlapping upserts that lock rows in different orders would deadlock.
        rows = sorted(rows, key=itemgetter(0))
        columns = zip(*rows, strict=True)
        return [(self._by_arrays, dict(zip(self._fields, columns, strict=True)))] if rows else []

    def of_mappings(self, rows: Sequence[Mapping[str, Any]]) -> list[Call]:
        """The same with VALUES, for mappings that may include the application's columns."""
        if not rows:
            return []
        ordered = sorted(map(dict, rows), key=itemgetter("task_id"))
        if len(ordered) == 1 and not self._is_distributed:
            return [(self._by_row, ordered[0])]  # it includes `then`: one round trip
        parts = [ordered[n : n + _MOST_VALUES] for n in range(0, len(ordered), _MOST_VALUES)]
        calls: list[Call] = [(self._by_values, p if len(p) > 1 else p[0]) for p in parts]
        if self._then is not None:
            calls.append((self._then, {"task_ids": [row["task_id"] for row in ordered]}))
        return calls

    @cached_property
    def _by_row(self) -> Insert:
        def inserted(columns: Sequence[Column[Any]]) -> FromClause:
            return select(*[_parameter(c).label(c.name) for c in columns]).subquery()

        return self._finish(self._insert_row(), inserted)

    @cached_property
    def _by_values(self) -> Insert:
        statement = self._finish(self._insert_row(), None)
        if not len(statement.exported_columns):
            # Only with RETURNING does SQLAlchemy send several rows in one statement.
            statement = statement.returning(self._target.c.task_id)
        return statement

    def _insert_row(self) -> PostgresInsert:
        columns = [self._target.c[name] for name in self._fields]
        row = {c.key: as_stored(_parameter(c), c) for c in columns}
        own = {c.key: bindparam(name, type_=c.type) for name, c in self._extra.items()}
        return insert(self._target).values(row | own)

    @cached_property
    def _by_arrays(self) -> Insert:
        columns = [self._target.c[name] for name in self._fields]
        rows = unnested(columns)
        stored = select(*starmap(as_stored, [(rows.c[c.name], c) for c in columns]))
        return self._finish(insert(self._target).from_select(self._fields, stored), unnested)


def unnested(columns: Sequence[Column[Any]], prefix: str = "") -> FromClause:
    """Rows from one array for each column; a parameter's name is the prefix and the column's name.

    An UPDATE needs a prefix: SQLAlchemy would set a column to a parameter of the same name.
    """
    # Not FROM unnest(...), whose rows PostgreSQL would first write into a tuplestore.
    arrays = [
        func.unnest(
            bindparam(prefix + c.name, type_=ARRAY(wire_type(c))), type_=wire_type(c)
        ).label(c.name)
        for c in columns
    ]
    return select(*arrays).subquery()


def wire_type(stored: Column[Any]) -> TypeEngine[Any]:
    """The type in which a column's values are sent."""
    if stored.name in _FROM_NOW:
        return Double()
    return Text() if isinstance(stored.type, JSONB) else stored.type


def as_stored(value: ColumnElement[Any], stored: Column[Any]) -> ColumnElement[Any]:
    """Converts a value of wire_type() to the column's type."""
    if stored.name in _FROM_NOW:
        return func.now() + as_interval(value)
    return cast(value, JSONB) if isinstance(stored.type, JSONB) else value


def _parameter(stored: Column[Any]) -> BindParameter[Any]:
    return bindparam(stored.name, type_=wire_type(stored))


def _has_computed_default(target: Table) -> bool:
    # For INSERT ... SELECT, SQLAlchemy would call a Python function once for all rows.
    return any(c.default is not None and c.default.is_callable for c in target.c)
