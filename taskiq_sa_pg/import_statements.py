"""From tables of taskiq-postgres to SQLAlchemy Core statements, which only read."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    LargeBinary,
    Select,
    String,
    TableClause,
    Text,
    Uuid,
    bindparam,
    column,
    func,
    literal_column,
    null,
    select,
    table,
)
from sqlalchemy.sql.elements import quoted_name
from sqlalchemy.types import TypeEngine

# As PostgreSQL calls the types of task ids that can be read.
TASK_ID_TYPES: Final[Mapping[str, TypeEngine[Any]]] = {
    "character varying": String(),
    "text": Text(),
    "uuid": Uuid(),
}
PAYLOAD_TYPE: Final = "bytea"


class OldRow(NamedTuple):
    """A row of a table of taskiq-postgres, in the order of select_old_rows()."""

    task_id: Any
    result: bytes | None
    progress: bytes | None


class OldStatements(NamedTuple):
    """What an import asks of the old table.

    The first batch takes `batch_size`, the most rows, and `max_bytes`: the row that reaches it is
    the last. The following ones also take `last`, the task id of the row before.
    """

    count_rows: Select[Any]
    select_first: Select[Any]
    select_following: Select[Any]


def build_old_statements(
    table_name: str, schema: str | None, task_id_type: TypeEngine[Any], *, has_progress: bool
) -> OldStatements:
    """The statements for a table; one that was made before there was progress has no column."""
    source = table(
        quoted_name(table_name, quote=True),
        column("task_id", task_id_type),
        column("result", LargeBinary()),
        column("progress", LargeBinary()),
        schema=None if schema is None else quoted_name(schema, quote=True),
    )
    task_id = source.c.task_id
    return OldStatements(
        count_rows=select(func.count(task_id)),
        select_first=_select_batch(source, task_id.is_not(None), has_progress),
        # By the column's own order, whatever its collation: the index has it.
        select_following=_select_batch(
            source, task_id > bindparam("last", type_=task_id_type), has_progress
        ),
    )


def _select_batch(
    source: TableClause, condition: ColumnElement[bool], has_progress: bool
) -> Select[Any]:
    task_id, result = source.c.task_id, source.c.result
    progress = source.c.progress if has_progress else null().cast(LargeBinary()).label("progress")
    size = _size_of(result) + _size_of(progress)
    size_before = (func.sum(size).over(order_by=task_id) - size).label("size_before")
    rows = (
        select(task_id, result, progress, size_before)
        .where(condition)
        .order_by(task_id)
        .limit(bindparam("batch_size", type_=Integer))
        .subquery("rows")
    )
    return (
        select(*[rows.c[name] for name in OldRow._fields])
        .where(rows.c.size_before < bindparam("max_bytes", type_=BigInteger))
        .order_by(rows.c.task_id)
    )


def _size_of(payload: ColumnElement[Any]) -> ColumnElement[int]:
    # Written out: a parameter would have to be given each time. PostgreSQL knows the length
    # without fetching the value.
    return func.coalesce(func.octet_length(payload), literal_column("0", Integer))
