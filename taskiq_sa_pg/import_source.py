"""Tables of taskiq-postgres, as they really are, read in batches."""

from collections.abc import AsyncIterator, Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg.catalogue import describe_columns
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.import_statements import (
    PAYLOAD_TYPE,
    TASK_ID_TYPES,
    OldRow,
    OldStatements,
    build_old_statements,
)
from taskiq_sa_pg.store import Store


class OldTable:
    """A table of taskiq-postgres.

    Raises everywhere:
        StorageError: PostgreSQL refused a statement or could not be reached.
    """

    def __init__(self, store: Store, statements: OldStatements, name: str) -> None:
        self._store = store
        self._statements = statements
        self._name = name

    async def count_rows(self) -> int:
        """How many rows it has now."""

        async def count(connection: AsyncConnection) -> int:
            return int((await connection.execute(self._statements.count_rows)).scalar_one())

        # A large table takes longer to count than a statement may otherwise take.
        return await self._store.transact(
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
        rows = await self._store.fetch(self._statements.select_first, limits, purpose)
        while rows:
            yield [OldRow._make(row) for row in rows]
            parameters = {**limits, "last": rows[-1][0]}
            rows = await self._store.fetch(self._statements.select_following, parameters, purpose)


async def find_old_table(
    store: Store, table_name: str, schema: str | None, *, retry_timeout: float | None = None
) -> OldTable:
    """The table, once it is sure that it is one of taskiq-postgres.

    With retry_timeout, which is instead of the store's own, as Store.transact().

    Raises:
        SchemaError: There is no such table, or it has other columns.
        StorageError: PostgreSQL could not be asked.
    """
    name = table_name if schema is None else f"{schema}.{table_name}"

    async def describe(connection: AsyncConnection) -> dict[str, str]:
        rows = await connection.execute(describe_columns([table_name], schema))
        return {row.column_name: row.type_name for row in rows}

    types = await store.transact(describe, f"look at table {name}", retry_timeout=retry_timeout)
    if not types:
        raise SchemaError(
            f"table {name} does not exist: give the old table's name to the letter, and its schema "
            "where the search_path does not lead there"
        )
    fits = (
        types.get("task_id") in TASK_ID_TYPES
        and types.get("result") == PAYLOAD_TYPE
        and types.get("progress", PAYLOAD_TYPE) == PAYLOAD_TYPE
    )
    if not fits:
        found = ", ".join(f"{column} {type_name}" for column, type_name in types.items())
        raise SchemaError(
            f"table {name} is not one of taskiq-postgres, which has task_id (one of "
            f"{', '.join(TASK_ID_TYPES)}), result and progress ({PAYLOAD_TYPE}). It has {found}"
        )
    statements = build_old_statements(
        table_name, schema, TASK_ID_TYPES[types["task_id"]], has_progress="progress" in types
    )
    return OldTable(store, statements, name)
