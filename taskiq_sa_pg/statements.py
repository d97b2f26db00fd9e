"""From models to SQLAlchemy Core statements: nothing here awaits, connects or formats a name.

JSON travels as text in both directions, so that neither the driver's nor the application's JSON
codec has a say in it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    Column,
    Delete,
    Insert,
    Integer,
    Select,
    Table,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    cast,
    collate,
    column,
    delete,
    false,
    func,
    literal_column,
    null,
    select,
    table,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.models import Models

MAX_IDS_PER_READ: Final = 200

# What most rows have in these columns, and the same in SQL; in the others it is NULL. Written out,
# because a parameter would have to be given each time.
_DEFAULTS: Final[Mapping[str, tuple[Any, ColumnElement[Any]]]] = {
    "is_err": (False, false()),
    "labels": ("{}", literal_column("'{}'", Text)),
    "attempt": (0, literal_column("0", Integer)),
}


_NULL: Final = (None, null())


class ResultRow(NamedTuple):
    """What set_result writes, in the order of the columns; JSON columns as text."""

    task_id: Any
    is_err: bool
    return_value: bytes | str
    error: bytes | str | None
    error_type: str | None
    traceback: str | None
    execution_time: float
    labels: str
    log: str | None
    task_name: str | None
    attempt: int
    expires_at: datetime | None


class ProgressRow(NamedTuple):
    """What set_progress writes; meta as ResultRow's return_value."""

    task_id: Any
    state: str
    meta: bytes | str | None


class StoredResult(NamedTuple):
    """What reading a result returns, in the order of select_results() and take_results()."""

    task_id: Any
    is_err: bool
    return_value: bytes | str
    error: bytes | str | None
    error_type: str | None
    execution_time: float
    labels: str
    log: str | None


class StoredProgress(NamedTuple):
    """What reading progress returns, in the order of select_progress()."""

    task_id: Any
    state: str
    meta: bytes | str | None


class Upsert(NamedTuple):
    """Stores rows, in one of two shapes.

    One array a column serves any number of rows with one text; a column in which all of them have
    the default needs no array. A row alone is worth a text of its own: its arrays would take
    PostgreSQL and asyncpg longer than all the rest.
    """

    one: Insert
    many: Insert

    def of(self, rows: Sequence[Any]) -> tuple[Insert, dict[str, Any]]:
        """The statement for one or more rows with distinct task ids, and its parameters."""
        if len(rows) == 1:
            return self.one, rows[0]._asdict()
        # Upserts that overlap and lock their rows in different orders deadlock.
        columns = zip(*sorted(rows, key=itemgetter(0)), strict=True)
        return self.many, {
            # unnest fills an array that is too short up with NULLs, and those are the defaults.
            name: () if values.count(_DEFAULTS.get(name, _NULL)[0]) == len(values) else values
            for name, values in zip(rows[0]._fields, columns, strict=True)
        }


class Statements(NamedTuple):
    """Every statement of one configuration, built once.

    Reads take `task_ids`: a list of column values.
    """

    upsert_results: Upsert
    upsert_progress: Upsert
    select_ready: Select[Any]
    select_results: Select[Any]
    take_results: Select[Any]
    select_progress: Select[Any]


def build_statements(models: Models) -> Statements:
    """The statements for these models."""
    return Statements(
        upsert_results=upsert_results(models),
        upsert_progress=upsert_progress(models),
        select_ready=select_ready(models),
        select_results=select_results(models),
        take_results=take_results(models),
        select_progress=select_progress(models),
    )


def upsert_results(models: Models) -> Upsert:
    """Stores results; one of a later attempt stays, an equal or earlier one is overwritten."""
    results = models.results_table

    def over_earlier(statement: PostgresInsert) -> Insert:
        return _on_conflict(
            statement,
            (*ResultRow._fields[1:], "finished_at"),
            where=statement.excluded.attempt >= results.c.attempt,
        )

    return Upsert(
        one=over_earlier(_insert_one(results, ResultRow._fields)),
        many=over_earlier(_insert_unnested(results, ResultRow._fields)),
    )


def upsert_progress(models: Models) -> Upsert:
    """Stores progress, replacing what was there."""
    progress = models.progress_table
    overwritten = (*ProgressRow._fields[1:], "updated_at")
    return Upsert(
        one=_on_conflict(_insert_one(progress, ProgressRow._fields), overwritten),
        many=_on_conflict(_insert_unnested(progress, ProgressRow._fields), overwritten),
    )


def select_ready(models: Models) -> Select[Any]:
    """Those of the task ids that have a result."""
    results = models.results_table
    return select(results.c.task_id).where(_is_asked_for(results))


def select_results(models: Models) -> Select[Any]:
    """The results of the task ids, as StoredResult."""
    results = models.results_table
    return select(*_readable(results, StoredResult._fields)).where(_is_asked_for(results))


def take_results(models: Models) -> Select[Any]:
    """Deletes the results of the task ids with their progress, and returns them."""
    results, progress = models.results_table, models.progress_table
    found = _locked(results, _is_asked_for(results)).cte("found")
    taken = (
        delete(results)
        .where(results.c.task_id == found.c.task_id)
        .returning(*_readable(results, StoredResult._fields))
        .cte("taken")
    )
    stale = _locked(progress, progress.c.task_id == taken.c.task_id).cte("stale")
    forgotten: Delete = delete(progress).where(progress.c.task_id == stale.c.task_id)
    return select(*taken.c).add_cte(forgotten.cte("forgotten"))


def select_progress(models: Models) -> Select[Any]:
    """The progress of the task ids, as StoredProgress."""
    progress = models.progress_table
    return select(*_readable(progress, StoredProgress._fields)).where(_is_asked_for(progress))


def notify() -> Select[Any]:
    """Sends notifications: on `channel` the `payloads`, texts of less than 8,000 bytes each."""
    payload = func.unnest(bindparam("payloads", type_=ARRAY(Text))).column_valued("payload")
    return select(func.pg_notify(bindparam("channel", type_=Text), payload).label("sent"))


def _on_conflict(
    statement: PostgresInsert,
    overwritten: Sequence[str],
    where: ColumnElement[bool] | None = None,
) -> Insert:
    # `excluded` alone on the right, because Citus refuses now() there; its finished_at and
    # updated_at are the columns' defaults.
    return statement.on_conflict_do_update(
        index_elements=["task_id"],
        set_={name: statement.excluded[name] for name in overwritten},
        where=where,
    )


def _insert_one(target: Table, names: Sequence[str]) -> PostgresInsert:
    columns = [target.c[name] for name in names]
    return insert(target).values(
        {c: _as_stored(bindparam(c.name, type_=_wire_type(c)), c) for c in columns}
    )


def _insert_unnested(target: Table, names: Sequence[str]) -> PostgresInsert:
    columns = [target.c[name] for name in names]
    rows = (
        func.unnest(*[bindparam(c.name, type_=ARRAY(_wire_type(c))) for c in columns])
        .table_valued(*[column(c.name, _wire_type(c)) for c in columns])
        .render_derived(name="rows")
    )
    return insert(target).from_select(
        names, select(*[_as_stored(_or_default(rows.c[c.name], c.name), c) for c in columns])
    )


def _wire_type(stored: Column[Any]) -> TypeEngine[Any]:
    return Text() if isinstance(stored.type, JSONB) else stored.type


def _or_default(value: ColumnElement[Any], name: str) -> ColumnElement[Any]:
    return func.coalesce(value, _DEFAULTS[name][1]) if name in _DEFAULTS else value


def _as_stored(value: ColumnElement[Any], stored: Column[Any]) -> ColumnElement[Any]:
    return cast(value, JSONB) if isinstance(stored.type, JSONB) else value


def _readable(source: Table, names: Sequence[str]) -> list[ColumnElement[Any]]:
    columns = [source.c[name] for name in names]
    return [cast(c, Text).label(c.name) if isinstance(c.type, JSONB) else c for c in columns]


def _locked(source: Table, condition: ColumnElement[bool]) -> Select[Any]:
    # In the order in which upserts lock their rows, Python's: else the two could deadlock.
    task_id = source.c.task_id
    order = task_id if isinstance(task_id.type, Uuid) else collate(task_id, "C")
    return select(task_id).where(condition).order_by(order).with_for_update(of=source)


def _is_asked_for(source: Table) -> ColumnElement[bool]:
    task_id = source.c.task_id
    return task_id == any_(bindparam("task_ids", type_=ARRAY(task_id.type)))


def describe_tables(config: TableConfig) -> Select[Any]:
    """The columns that the configured tables really have, in one catalogue query.

    Rows of table name, column name, type name, whether a value is required (NOT NULL without a
    default), and whether the column alone is unique, as ON CONFLICT needs it.
    """
    classes = _catalogue("pg_class", "oid", "relname", "relnamespace", "relkind")
    namespaces = _catalogue("pg_namespace", "oid", "nspname")
    columns = _catalogue(
        "pg_attribute",
        *("attrelid", "attname", "atttypid", "attnum", "attnotnull", "atthasdef"),
        *("attidentity", "attisdropped"),
    )
    index = _catalogue(
        "pg_index",
        *("indrelid", "indisunique", "indimmediate", "indisvalid"),
        *("indnkeyatts", "indpred", "indkey"),
    )
    is_unique = (
        select(1)
        .where(
            index.c.indrelid == classes.c.oid,
            # ON CONFLICT can use no deferrable constraint, and no index that is not complete.
            index.c.indisunique,
            index.c.indimmediate,
            index.c.indisvalid,
            index.c.indnkeyatts == 1,
            index.c.indpred.is_(None),
            type_coerce(index.c.indkey, ARRAY(Integer))[0] == columns.c.attnum,
        )
        .exists()
    )
    named = classes.c.relname.in_([config.table_name, config.progress_table_name])
    if config.schema is None:
        placed: ColumnElement[bool] = func.pg_catalog.pg_table_is_visible(classes.c.oid)
    else:
        placed = namespaces.c.nspname == config.schema
    described: list[ColumnElement[Any]] = [
        cast(classes.c.relname, Text).label("table_name"),
        cast(columns.c.attname, Text).label("column_name"),
        func.format_type(columns.c.atttypid, None, type_=Text).label("type_name"),
        and_(columns.c.attnotnull, ~columns.c.atthasdef, columns.c.attidentity == "").label(
            "is_required"
        ),
        is_unique.label("is_unique"),
    ]
    return (
        select(*described)
        .join_from(classes, namespaces, namespaces.c.oid == classes.c.relnamespace)
        .join(columns, and_(columns.c.attrelid == classes.c.oid, columns.c.attnum > 0))
        .where(named, placed, classes.c.relkind.in_(["r", "p", "f"]), ~columns.c.attisdropped)
        .order_by(classes.c.relname, columns.c.attnum)
    )


def _catalogue(name: str, *column_names: str) -> Any:
    return table(name, *[column(c) for c in column_names], schema="pg_catalog")
