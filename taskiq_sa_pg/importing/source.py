"""Tables of taskiq-postgres, as they really are, read in batches. Nothing is written."""

from collections.abc import AsyncIterator, Mapping, Sequence
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
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.models import quoted
from taskiq_sa_pg.schema import describe_columns

# As PostgreSQL calls the types of task ids that can be read.
_TASK_ID_TYPES: Final[Mapping[str, TypeEngine[Any]]] = {
    "character varying": String(),
    "text": Text(),
    "uuid": Uuid(),
}
_PAYLOAD_TYPE: Final = "bytea"


class OldRow(NamedTuple):
    """A row of a table of taskiq-postgres, in the order of _select_batch()."""

    task_id: Any
    result: bytes | None
    progress: bytes | None


class OldTable:
    """A table of taskiq-postgres.

    Raises everywhere:
        StorageError: PostgreSQL refused a statement or could not be reached.
    """

    def __init__(
        self,
        database: Database,
        table_name: str,
        schema: str | None,
        task_id_type: TypeEngine[Any],
        *,
        has_progress: bool,  # one that was made before there was progress has no column
    ) -> None:
        source = table(
            quoted(table_name),
            column("task_id", task_id_type),
            column("result", LargeBinary()),
            column("progress", LargeBinary()),
            schema=None if schema is None else quoted(schema),
        )
        task_id = source.c.task_id
        self._database = database
        self._name = table_name if schema is None else f"{schema}.{table_name}"
        self._count = select(func.count(task_id))
        self._select_first = _select_batch(source, task_id.is_not(None), has_progress)
        # By the column's own order, whatever its collation: the index has it.
        last = bindparam("last", type_=task_id_type)
        self._select_following = _select_batch(source, task_id > last, has_progress)

    async def count_rows(self) -> int:
        """How many rows it has now."""

        async def count(connection: AsyncConnection) -> int:
            return int((await connection.execute(self._count)).scalar_one())

        # A large table takes longer to count than a statement may otherwise take.
        return await self._database.transact(
            count, f"count the rows of table {self._name}", is_limited=False
        )

    async def read(self, batch_size: int, max_bytes: int) -> AsyncIterator[Sequence[OldRow]]:
        """All rows in the order of their task ids, each batch in a transaction of its own.

        Args:
            batch_size: The most rows in a batch.
            max_bytes: The row that reaches it is the last of its batch.
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
    """The table, once it is sure that it is one of taskiq-postgres.

    With retry_timeout, which is instead of the usual, as Database.transact().

    Raises:
        SchemaError: There is no such table, or it has other columns.
        StorageError: PostgreSQL could not be asked.
    """
    name = table_name if schema is None else f"{schema}.{table_name}"

    async def describe(connection: AsyncConnection) -> dict[str, str]:
        rows = await connection.execute(describe_columns([table_name], schema))
        return {row.column_name: row.type_name for row in rows}

    types = await database.transact(describe, f"look at table {name}", retry_timeout=retry_timeout)
    if not types:
        raise SchemaError(
            f"table {name} does not exist: give the old table's name to the letter, and its schema "
            "where the search_path does not lead there"
        )
    fits = (
        types.get("task_id") in _TASK_ID_TYPES
        and types.get("result") == _PAYLOAD_TYPE
        and types.get("progress", _PAYLOAD_TYPE) == _PAYLOAD_TYPE
    )
    if not fits:
        found = ", ".join(f"{column} {type_name}" for column, type_name in types.items())
        raise SchemaError(
            f"table {name} is not one of taskiq-postgres, which has task_id (one of "
            f"{', '.join(_TASK_ID_TYPES)}), result and progress ({_PAYLOAD_TYPE}). It has {found}"
        )
    task_id_type, has_progress = _TASK_ID_TYPES[types["task_id"]], "progress" in types
    return OldTable(database, table_name, schema, task_id_type, has_progress=has_progress)


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
