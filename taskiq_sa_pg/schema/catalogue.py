"""Queries of PostgreSQL's catalogues about the tables that exist."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by

from taskiq_sa_pg.models import TableConfig

# PostgreSQL's names of the types of taskiq-postgres' columns.
OLD_TASK_ID_TYPES: Final = ("character varying", "text", "uuid")
OLD_PAYLOAD_TYPE: Final = "bytea"

# TRIGGER_TYPE_DELETE, a bit of pg_trigger.tgtype.
_ON_DELETE: Final[sa.ColumnElement[int]] = sa.literal_column("8")


def is_of_taskiq_postgres(types: Mapping[str, str]) -> bool:
    """Whether a table with these column types, by column name, is one of taskiq-postgres.

    Old tables have no column for progress.
    """
    payloads = {types.get("result"), types.get("progress", OLD_PAYLOAD_TYPE)}
    return types.get("task_id") in OLD_TASK_ID_TYPES and payloads == {OLD_PAYLOAD_TYPE}


def describe_columns(table_names: Sequence[str], schema: str | None) -> sa.Select[Any]:
    """The columns of existing tables, in one catalogue query; without a schema, of visible tables.

    Rows of table name, column name, type name, whether a value is required (NOT NULL without a
    default), and whether the column alone is unique, as ON CONFLICT needs; then the table's
    schema, the current role, whether it may use the schema, its missing privileges on the table,
    and whether the database has the extension Citus.
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
        # ON CONFLICT cannot use a deferrable constraint, or a partial or invalid index.
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
        _has_citus().label("has_citus"),
    ]
    return (
        found.with_only_columns(*described)
        .join(columns, sa.and_(columns.c.attrelid == classes.c.oid, columns.c.attnum > 0))
        .where(~columns.c.attisdropped)
        .order_by(classes.c.relname, columns.c.attnum)
    )


def has_citus() -> sa.Select[Any]:
    """Whether the database has the extension Citus."""
    return sa.select(_has_citus())


def select_sizes(config: TableConfig, *, is_citus: bool = False) -> sa.Select[Any]:
    """Name and size of each existing table, in bytes with indexes and TOAST.

    The size includes all partitions and, with Citus, all shards.
    """
    classes, _, found = _find_relations(config.table_names, config.schema)
    size: sa.ColumnElement[int] = sa.func.pg_total_relation_size(classes.c.oid, type_=sa.BigInteger)
    part = sa.func.pg_partition_tree(classes.c.oid).table_valued("relid")
    of_part = sa.func.pg_total_relation_size(part.c.relid, type_=sa.BigInteger)
    # A table that is not partitioned has no tree; a partitioned one has no pages of its own.
    of_parts = sa.select(sa.cast(sa.func.sum(of_part), sa.BigInteger)).scalar_subquery()
    size = sa.func.coalesce(of_parts, size)
    if is_citus:
        distributed = _catalogue("pg_dist_partition", "logicalrelid")
        is_distributed = sa.exists().where(distributed.c.logicalrelid == classes.c.oid)
        # False: no error if the table is dropped meanwhile.
        of_shards = sa.func.citus_total_relation_size(
            classes.c.oid, sa.false(), type_=sa.BigInteger
        )
        size = sa.case((is_distributed, of_shards), else_=size)
    return found.with_only_columns(classes.c.relname, size).order_by(classes.c.relname)


def select_partitioned(config: TableConfig) -> sa.Select[Any]:
    """How the results table is partitioned.

    A row of its schema, the partition key such as "RANGE (task_id)" (NULL if it is not
    partitioned), the server's time, whether task ids are of type uuid, and the names of the columns
    that are not generated.
    """
    classes, namespaces, found = _find_relations([config.table_name], config.schema)
    names = "attrelid attname atttypid attnum attisdropped attgenerated"
    column = _catalogue("pg_attribute", names)
    is_own = sa.and_(
        column.c.attrelid == classes.c.oid,
        column.c.attnum > 0,
        ~column.c.attisdropped,
        column.c.attgenerated == "",
    )
    of_all = sa.func.array_agg(aggregate_order_by(column.c.attname, column.c.attnum))
    type_name = sa.func.format_type(column.c.atttypid, None, type_=sa.Text)
    is_uuid = sa.select(type_name == "uuid").where(is_own, column.c.attname == "task_id")
    described: list[sa.ColumnElement[Any]] = [
        sa.cast(namespaces.c.nspname, sa.Text).label("schema_name"),
        sa.func.pg_get_partkeydef(classes.c.oid, type_=sa.Text).label("key"),
        sa.func.now().label("now"),
        is_uuid.scalar_subquery().label("is_uuid"),
        sa.cast(sa.select(of_all).where(is_own).scalar_subquery(), ARRAY(sa.Text)).label("columns"),
    ]
    return found.with_only_columns(*described)


def select_partitions(config: TableConfig) -> sa.Select[Any]:
    """The partitions of the results table and their subpartitions, which have a level above 1.

    Rows of schema, name, relkind, bounds as SQL, level, and whether a DELETE fires triggers, such
    as those of foreign keys.
    """
    parents, _, found = _find_relations([config.table_name], config.schema)
    parts = _catalogue("pg_class", "oid relname relnamespace relkind relpartbound").alias("part")
    namespaces = _catalogue("pg_namespace", "oid nspname").alias("place")
    tree = sa.func.pg_partition_tree(parents.c.oid).table_valued("relid", "level")
    trigger = _catalogue("pg_trigger", "tgrelid tgtype")
    acts = (trigger.c.tgrelid == parts.c.oid) & (trigger.c.tgtype.op("&")(_ON_DELETE) != 0)
    described: list[sa.ColumnElement[Any]] = [
        sa.cast(namespaces.c.nspname, sa.Text).label("schema_name"),
        sa.cast(parts.c.relname, sa.Text).label("name"),
        sa.cast(parts.c.relkind, sa.Text).label("relkind"),
        sa.func.pg_get_expr(parts.c.relpartbound, parts.c.oid, type_=sa.Text).label("bounds"),
        tree.c.level,
        sa.exists().where(acts).label("has_triggers"),
    ]
    return (
        found.with_only_columns(*described)
        .join(tree, tree.c.level > 0)
        .join(parts, parts.c.oid == tree.c.relid)
        .join(namespaces, namespaces.c.oid == parts.c.relnamespace)
    )


def select_closed_schemas(table_name: str) -> sa.Select[Any]:
    """The schemas with a table of that name that the current role may not use.

    Rows of schema name, the current role, and the setting search_path.
    """
    _, namespaces, found = _find_relations([table_name], None, is_any=True)
    is_open = sa.func.has_schema_privilege(namespaces.c.oid, "USAGE", type_=sa.Boolean)
    name = sa.cast(namespaces.c.nspname, sa.Text).label("schema_name")
    search_path = sa.func.current_setting("search_path", type_=sa.Text).label("search_path")
    selected: list[sa.ColumnElement[Any]] = [name, _current_role(), search_path]
    return found.with_only_columns(*selected).where(~is_open)


def select_is_distributed(table_name: str, schema: str | None) -> sa.Select[Any]:
    """Whether Citus distributes the rows of a table over nodes; needs Citus."""
    classes, _, found = _find_relations([table_name], schema)
    partition = _catalogue("pg_dist_partition", "logicalrelid partmethod")
    by_hash = sa.and_(partition.c.logicalrelid == classes.c.oid, partition.c.partmethod == "h")
    return found.with_only_columns(sa.exists().where(by_hash))


def _has_citus() -> sa.ColumnElement[bool]:
    extension = _catalogue("pg_extension", "extname")
    return sa.exists().where(extension.c.extname == "citus")


def _current_role() -> sa.ColumnElement[str]:
    return sa.cast(sa.func.current_user(), sa.Text).label("role_name")


def _missing_rights(classes: Any) -> sa.ColumnElement[str]:
    """The privileges that the current role lacks, in the form of GRANT."""
    # A privilege that is granted on columns counts, whichever columns these are.
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
    """pg_class, pg_namespace, and a select of the oids of tables.

    Without a schema, of visible tables; with is_any, of tables in any schema.
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
