"""How rows become an INSERT: some as VALUES, or any number as one array for each column.

JSON travels as text, so that neither the driver's nor the application's JSON codec has a say in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import starmap
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    Column,
    Double,
    FromClause,
    Insert,
    Table,
    Text,
    bindparam,
    cast,
    column,
    func,
    select,
    values,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.models import as_interval

# How many rows a text with VALUES has. Few sizes, so that each is compiled and prepared once.
_SIZES: Final = (64, 16, 4, 1)

# Times that travel as seconds from now, by the database's clock.
_FROM_NOW: Final = frozenset({"expires_at", "available_at"})

NOTHING: Final[Mapping[str, Column[Any]]] = MappingProxyType({})

# A statement and its parameters.
Call = tuple[Insert, dict[str, Any]]

# Some columns of the rows that an INSERT stores, for other parts of its statement.
Inserted = Callable[[Sequence[Column[Any]]], FromClause]


class Upsert:
    """Stores rows: one by a text of its own, any number by one with an array for each column.

    Rows with values for the application's own columns, and those of a table of which SQLAlchemy has
    to compute a default for each row, are stored by VALUES with several rows.

    Args:
        target: The table.
        fields: The columns that are stored, called like the fields of a row.
        finish: Adds what becomes of conflicts.
        extra: Columns of the application's own that are stored, by parameter.
    """

    def __init__(
        self,
        target: Table,
        fields: Sequence[str],
        finish: Callable[[PostgresInsert, Inserted], Insert],
        extra: Mapping[str, Column[Any]] = NOTHING,
    ) -> None:
        self._target = target
        self._fields = tuple(fields)
        self._finish = finish
        self._extra = extra
        self._by_values: dict[int, Insert] = {}

    def of(self, rows: Sequence[Any]) -> list[Call]:
        """What stores named tuples with distinct task ids; one statement if there is one row."""
        if len(rows) > 1:
            # Upserts that overlap and lock their rows in different orders deadlock.
            rows = sorted(rows, key=itemgetter(0))
            if not (self._extra or _has_computed_default(self._target)):
                arrays = dict(zip(self._fields, zip(*rows, strict=True), strict=True))
                return [(self._by_arrays, arrays)]
        return list(self._calls([row._asdict() for row in rows]))

    def of_mappings(self, rows: Sequence[Mapping[str, Any]]) -> list[Call]:
        """The same of rows by parameter, those of the application's own columns among them."""
        return list(self._calls(sorted(rows, key=itemgetter("task_id"))))

    def _calls(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Call]:
        start = 0
        while start < len(rows):
            size = next(size for size in _SIZES if size <= len(rows) - start)
            if size not in self._by_values:
                self._by_values[size] = self._insert_values(size)
            parameters = {
                _numbered(name, number): value
                for number, row in enumerate(rows[start : start + size])
                for name, value in row.items()
            }
            yield self._by_values[size], parameters
            start += size

    def _insert_values(self, size: int) -> Insert:
        def inserted(columns: Sequence[Column[Any]]) -> FromClause:
            names = [column(c.name, wire_type(c)) for c in columns]
            rows = [tuple(_parameter(c, number) for c in columns) for number in range(size)]
            return values(*names, name="inserted").data(rows)

        columns = [self._target.c[name] for name in self._fields]
        rows = [
            {c.key: as_stored(_parameter(c, number), c) for c in columns}
            | {
                c.key: bindparam(_numbered(name, number), type_=c.type)
                for name, c in self._extra.items()
            }
            for number in range(size)
        ]
        statement = insert(self._target).values(rows if size > 1 else rows[0])
        return self._finish(statement, inserted)

    @cached_property
    def _by_arrays(self) -> Insert:
        columns = [self._target.c[name] for name in self._fields]
        rows = unnested(columns)
        stored = select(*starmap(as_stored, [(rows.c[c.name], c) for c in columns]))
        return self._finish(insert(self._target).from_select(self._fields, stored), unnested)


def unnested(columns: Sequence[Column[Any]], prefix: str = "") -> FromClause:
    """Rows from one array for each column, which the parameters are called like, after a prefix.

    An UPDATE needs one: a parameter that is called like a column is a new value to SQLAlchemy.
    """
    # Not FROM unnest(...), whose rows PostgreSQL first puts into a store, to read them from there.
    arrays = [
        func.unnest(
            bindparam(prefix + c.name, type_=ARRAY(wire_type(c))), type_=wire_type(c)
        ).label(c.name)
        for c in columns
    ]
    return select(*arrays).subquery()


def wire_type(stored: Column[Any]) -> TypeEngine[Any]:
    """The type as which a column's values travel."""
    if stored.name in _FROM_NOW:
        return Double()
    return Text() if isinstance(stored.type, JSONB) else stored.type


def as_stored(value: ColumnElement[Any], stored: Column[Any]) -> ColumnElement[Any]:
    """What a column stores of a value that travels as its wire_type()."""
    if stored.name in _FROM_NOW:
        return func.now() + as_interval(value)
    return cast(value, JSONB) if isinstance(stored.type, JSONB) else value


def _parameter(stored: Column[Any], number: int) -> BindParameter[Any]:
    return bindparam(_numbered(stored.name, number), type_=wire_type(stored))


def _numbered(name: str, number: int) -> str:
    # The number first: no attribute of the application's model begins with one.
    return f"{number}__{name}" if number else name


def _has_computed_default(target: Table) -> bool:
    # Of INSERT ... SELECT, SQLAlchemy would call a Python function once for all rows.
    return any(c.default is not None and c.default.is_callable for c in target.c)
