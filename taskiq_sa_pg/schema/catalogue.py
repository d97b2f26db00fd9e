"""What tables really are: PostgreSQL's catalogues to SQLAlchemy Core statements."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from taskiq_sa_pg.models import TableConfig

# As PostgreSQL calls the types of taskiq-postgres' columns.
OLD_TASK_ID_TYPES: Final = ("character varying", "text", "uuid")
OLD_PAYLOAD_TYPE: Final = "bytea"


def is_of_taskiq_postgres(types: Mapping[str, str]) -> bool:
    """Whether columns of these types, by name, make a table of taskiq-postgres.

    One that was made before there was progress has no column for it.
    """
    payloads = {types.get("result"), types.get("progress", OLD_PAYLOAD_TYPE)}
    return types.get("task_id") in OLD_TASK_ID_TYPES and payloads == {OLD_PAYLOAD_TYPE}


def describe_columns(table_names: Sequence[str], schema: str | None) -> sa.Select[Any]:
    """The columns that tables really have, in one catalogue query; without a schema, the visible.

    Rows of table name, column name, type name, whether a value is required (NOT NULL without a
    default), and whether the column alone is unique, as ON CONFLICT needs it; then the table's
    schema, the current role, whether it may use the schema, and its missing rights on the table.
    """
    classes, namespaces, found = _find_relations(table_names, schema)
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
        sa.cast(namespaces.c.nspname, sa.Text).label("schema_name"),
        _current_role(),
        sa.func.has_schema_privilege(namespaces.c.oid, "USAGE", type_=sa.Boolean).label("is_open"),
        _missing_rights(classes).label("missing_rights"),
    ]
    return (
        found.with_only_columns(*described)
        .join(columns, sa.and_(columns.c.attrelid == classes.c.oid, columns.c.attnum > 0))
        .where(~columns.c.attisdropped)
        .order_by(classes.c.relname, columns.c.attnum)
    )


def select_sizes(config: TableConfig) -> sa.Select[Any]:
    """Name and bytes, with indexes and TOAST, of each of the tables that exists."""
    classes, _, found = _find_relations(config.table_names, config.schema)
    size = sa.func.pg_total_relation_size(classes.c.oid, type_=sa.BigInteger)
    return found.with_only_columns(classes.c.relname, size).order_by(classes.c.relname)


def select_closed_schemas(table_name: str) -> sa.Select[Any]:
    """Where there is a table of that name, and the current role may not see it.

    Rows of schema name, the current role, and the search_path as it was set.
    """
    _, namespaces, found = _find_relations([table_name], None, is_any=True)
    is_open = sa.func.has_schema_privilege(namespaces.c.oid, "USAGE", type_=sa.Boolean)
    name = sa.cast(namespaces.c.nspname, sa.Text).label("schema_name")
    search_path = sa.func.current_setting("search_path", type_=sa.Text).label("search_path")
    selected: list[sa.ColumnElement[Any]] = [name, _current_role(), search_path]
    return found.with_only_columns(*selected).where(~is_open)


def _current_role() -> sa.ColumnElement[str]:
    return sa.cast(sa.func.current_user(), sa.Text).label("role_name")


def _missing_rights(classes: Any) -> sa.ColumnElement[str]:
    """Those that the backend needs and the current role does not have, as GRANT takes them."""
    # Where a right is granted on columns, it is left to who did that whether these are all.
    of_columns, of_table = sa.func.has_any_column_privilege, sa.func.has_table_privilege
    checks = {"SELECT": of_columns, "INSERT": of_columns, "UPDATE": of_columns, "DELETE": of_table}
    missing = [
        sa.case((~has(classes.c.oid, right, type_=sa.Boolean), right))
        for right, has in checks.items()
    ]
    return sa.func.concat_ws(", ", *missing, type_=sa.Text)


def _find_relations(
    table_names: Collection[str], schema: str | None, *, is_any: bool = False
) -> tuple[Any, Any, sa.Select[Any]]:
    """pg_class, pg_namespace, and a select that finds tables in them, by their oid.

    Without a schema, those that are visible, or in any.
    """
    classes = _catalogue("pg_class", "oid relname relnamespace relkind")
    namespaces = _catalogue("pg_namespace", "oid nspname")
    is_visible = sa.func.pg_catalog.pg_table_is_visible(classes.c.oid)
    placed = is_visible if schema is None else namespaces.c.nspname == schema
    if is_any:
        placed = sa.true()
    named = classes.c.relname.in_(table_names)
    found = (
        sa.select(classes.c.oid)
        .join_from(classes, namespaces, namespaces.c.oid == classes.c.relnamespace)
        .where(named, placed, classes.c.relkind.in_(["r", "p", "f"]))
    )
    return classes, namespaces, found


def _catalogue(name: str, column_names: str) -> Any:
    return sa.table(name, *map(sa.column, column_names.split()), schema="pg_catalog")
