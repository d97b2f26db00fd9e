"""What tables really are: PostgreSQL's catalogues to SQLAlchemy Core statements."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from taskiq_sa_pg.models import TableConfig


def describe_columns(table_names: Sequence[str], schema: str | None) -> sa.Select[Any]:
    """The columns that tables really have, in one catalogue query; without a schema, the visible.

    Rows of table name, column name, type name, whether a value is required (NOT NULL without a
    default), and whether the column alone is unique, as ON CONFLICT needs it.
    """
    classes, found = _find_relations(table_names, schema)
    columns = _catalogue(
        "pg_attribute",
        "attrelid attname atttypid attnum attnotnull atthasdef attidentity attisdropped",
    )
    index = _catalogue(
        "pg_index",
        "indrelid indisunique indimmediate indisvalid indnkeyatts indpred indkey",
    )
    is_unique = sa.exists().where(
        index.c.indrelid == classes.c.oid,
        # ON CONFLICT can use no deferrable constraint, and no index that is not complete.
        index.c.indisunique,
        index.c.indimmediate,
        index.c.indisvalid,
        index.c.indnkeyatts == 1,
        index.c.indpred.is_(None),
        sa.type_coerce(index.c.indkey, ARRAY(sa.Integer))[0] == columns.c.attnum,
    )
    is_required = columns.c.attnotnull & ~columns.c.atthasdef & (columns.c.attidentity == "")
    described: list[sa.ColumnElement[Any]] = [
        sa.cast(classes.c.relname, sa.Text).label("table_name"),
        sa.cast(columns.c.attname, sa.Text).label("column_name"),
        sa.func.format_type(columns.c.atttypid, None, type_=sa.Text).label("type_name"),
        is_required.label("is_required"),
        is_unique.label("is_unique"),
    ]
    return (
        found.with_only_columns(*described)
        .join(columns, sa.and_(columns.c.attrelid == classes.c.oid, columns.c.attnum > 0))
        .where(~columns.c.attisdropped)
        .order_by(classes.c.relname, columns.c.attnum)
    )


def select_sizes(config: TableConfig) -> sa.Select[Any]:
    """Name and bytes, with indexes and TOAST, of each of the tables that exists."""
    classes, found = _find_relations(config.table_names, config.schema)
    size = sa.func.pg_total_relation_size(classes.c.oid, type_=sa.BigInteger)
    return found.with_only_columns(classes.c.relname, size).order_by(classes.c.relname)


def _find_relations(table_names: Sequence[str], schema: str | None) -> tuple[Any, sa.Select[Any]]:
    """pg_class, and a select of it that finds tables, by their oid; without a schema, visible."""
    classes = _catalogue("pg_class", "oid relname relnamespace relkind")
    namespaces = _catalogue("pg_namespace", "oid nspname")
    is_visible = sa.func.pg_catalog.pg_table_is_visible(classes.c.oid)
    placed = is_visible if schema is None else namespaces.c.nspname == schema
    named = classes.c.relname.in_(table_names)
    found = (
        sa.select(classes.c.oid)
        .join_from(classes, namespaces, namespaces.c.oid == classes.c.relnamespace)
        .where(named, placed, classes.c.relkind.in_(["r", "p", "f"]))
    )
    return classes, found


def _catalogue(name: str, column_names: str) -> Any:
    return sa.table(name, *map(sa.column, column_names.split()), schema="pg_catalog")
