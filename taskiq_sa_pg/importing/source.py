"""Reads tables of taskiq-postgres in batches. Nothing is written."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.models import quoted
from taskiq_sa_pg.schema import (
    OLD_PAYLOAD_TYPE,
    OLD_TASK_ID_TYPES,
    describe_columns,
    is_of_taskiq_postgres,
)

_TASK_ID_TYPES: Final[Mapping[str, sa.types.TypeEngine[Any]]] = dict(
    zip(OLD_TASK_ID_TYPES, (sa.String(), sa.Text(), sa.Uuid()), strict=True)
)


class OldRow(NamedTuple):
    """A row of a table of taskiq-postgres, in the order of _select_batch()."""

    task_id: Any
    result: bytes | None
    progress: bytes | None


class OldTable:
    """A table of taskiq-postgres."""

    def __init__(self, database: Database, name: str, source: sa.TableClause) -> None:
        task_id = source.c.task_id
        self._database = database
        self._name = name
        self._count = sa.select(sa.func.count(task_id))
        self._select_first = _select_batch(source, task_id.is_not(None))
        # In the column's own collation, because the index has it.
        last = sa.bindparam("last", type_=task_id.type)
        self._select_following = _select_batch(source, task_id > last)

    async def count_rows(self) -> int:
        """Returns the current number of rows."""

        async def count(connection: AsyncConnection) -> int:
            return (await connection.execute(self._count)).scalar_one()

        purpose = f"count the rows of table {self._name}"
        # Counting a large table may exceed the usual time limit of a statement.
        return await self._database.transact(count, purpose, is_limited=False)

    async def read(self, batch_size: int, max_bytes: int) -> AsyncIterator[Sequence[OldRow]]:
        """Yields all rows in the order of their task ids, each batch in its own transaction.

        The row that reaches max_bytes is the last one of its batch.
        """
        purpose = f"read table {self._name}"
        limits = {"batch_size": batch_size, "max_bytes": max_bytes}
        rows = await self._database.fetch(self._select_first, limits, purpose)
        while rows:
            yield [OldRow._make(row) for row in rows]
            parameters = {**limits, "last": rows[-1][0]}
            rows = await self._database.fetch(self._select_following, parameters, purpose)


async def find_old_table(
    database: Database, table_name: str, schema: str | None, *, retry_timeout: float | None = None
) -> OldTable:
    """Returns the table, after a check that it is a table of taskiq-postgres.

    Raises:
        SchemaError: The table does not exist, or has other columns.
    """
    name = table_name if schema is None else f"{schema}.{table_name}"

    async def describe(connection: AsyncConnection) -> dict[str, str]:
        rows = await connection.execute(describe_columns([table_name], schema))
        return {row.column_name: row.type_name for row in rows}

    types = await database.transact(describe, f"check table {name}", retry_timeout=retry_timeout)
    if not types:
        raise SchemaError(
            f"table {name} does not exist: pass the exact name of the old table, and its schema if "
            "that is not in the search_path"
        )
    if not is_of_taskiq_postgres(types):
        found = ", ".join(f"{column} {type_name}" for column, type_name in types.items())
        raise SchemaError(
            f"table {name} is not a table of taskiq-postgres, which has the columns task_id (one "
            f"of {', '.join(OLD_TASK_ID_TYPES)}), result and progress ({OLD_PAYLOAD_TYPE}). It has "
            f"{found}"
        )
    task_id = sa.column("task_id", _TASK_ID_TYPES[types["task_id"]])
    # A table from before progress existed has no column for it.
    payloads = [sa.column(c, sa.LargeBinary()) for c in ("result", "progress") if c in types]
    place = None if schema is None else quoted(schema)
    return OldTable(database, name, sa.table(quoted(table_name), task_id, *payloads, schema=place))


def _select_batch(source: sa.TableClause, condition: sa.ColumnElement[bool]) -> sa.Select[Any]:
    task_id, result = source.c.task_id, source.c.result
    progress = source.c.get("progress", sa.null().cast(sa.LargeBinary()).label("progress"))
    size = _size_of(result) + _size_of(progress)
    size_before = (sa.func.sum(size).over(order_by=task_id) - size).label("size_before")
    rows = (
        sa.select(task_id, result, progress, size_before)
        .where(condition)
        .order_by(task_id)
        .limit(sa.bindparam("batch_size", type_=sa.Integer))
        .subquery("rows")
    )
    return (
        sa.select(*[rows.c[name] for name in OldRow._fields])
        .where(rows.c.size_before < sa.bindparam("max_bytes", type_=sa.BigInteger))
        .order_by(rows.c.task_id)
    )


def _size_of(payload: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    # As a literal: a parameter would have to be passed each time. PostgreSQL knows the length
    # without fetching the value.
    return sa.func.coalesce(sa.func.octet_length(payload), sa.literal_column("0", sa.Integer))
