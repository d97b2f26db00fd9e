"""The floor: bare asyncpg doing set_result's database work, without encoding anything."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import asyncpg
from sqlalchemy import Insert
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect

from benchmarks.contenders import make_result
from taskiq_sa_pg import Models, SQLAlchemyResultBackend
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.rows import FIRST_FIELDS, ResultRow
from taskiq_sa_pg.upserts import ResultUpserts

PREPARED: Final = "one prepared upsert a call"
BATCHES: Final = "batches of 500 through unnest"
ROWS_PER_BATCH: Final = 500
BATCH_CALLERS: Final = 2
TABLE: Final = "floor_results"
_PREPARED_CONNECTIONS: Final = 10

Fetch = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Floor:
    """Statements that are prepared on connections of their own; callers queue for them."""

    codec: Codec
    upserts: asyncio.LifoQueue[Fetch]
    batch_upserts: asyncio.LifoQueue[Fetch]

    def encode(self, return_value: str) -> ResultRow:
        return self.codec.encode_result("", make_result(return_value))

    async def upsert(self, row: ResultRow, task_id: str) -> None:
        await _fetch(self.upserts, task_id, *row[1 : len(FIRST_FIELDS)])

    async def upsert_batch(self, columns: Sequence[Sequence[Any]], task_ids: list[str]) -> None:
        await _fetch(self.batch_upserts, task_ids, *columns)


def as_columns(row: ResultRow) -> list[list[Any]]:
    """A batch of this row, without its task ids: twelve full arrays."""
    return [[value] * ROWS_PER_BATCH for value in row[1 : len(FIRST_FIELDS)]]


@asynccontextmanager
async def open_floor(dsn: str) -> AsyncIterator[Floor]:
    models = await _make_tables(dsn)
    statements = ResultUpserts(models).without_metadata
    assert statements.many is not None
    async with AsyncExitStack() as stack:
        yield Floor(
            Codec(models.config),
            await _prepare(stack, dsn, statements.one, _PREPARED_CONNECTIONS),
            await _prepare(stack, dsn, statements.many, BATCH_CALLERS),
        )


async def _make_tables(dsn: str) -> Models:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        dsn, table_name=TABLE, run_migrations=True
    )
    await backend.startup()
    await backend.shutdown()
    return backend.models


async def _prepare(
    stack: AsyncExitStack, dsn: str, statement: Insert, connections: int
) -> asyncio.LifoQueue[Fetch]:
    dialect = asyncpg_dialect.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    compiled = statement.compile(dialect=dialect)
    # The parameters for what all rows have in common come first; every column goes as an array.
    names = compiled.positiontup or []
    unused = [None] * (len(names) - len(FIRST_FIELDS))
    assert names[len(unused) :] == list(FIRST_FIELDS)
    # A lone caller stays on one connection: taking turns among several would cost time.
    prepared: asyncio.LifoQueue[Fetch] = asyncio.LifoQueue()
    for _ in range(connections):
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        upsert = await connection.prepare(str(compiled))
        prepared.put_nowait(partial(upsert.fetch, *unused))
        # Until the next statement the server takes the preparation for a transaction.
        await connection.execute("SELECT 1")
    return prepared


async def _fetch(free: asyncio.LifoQueue[Fetch], *arguments: Any) -> None:
    fetch = await free.get()
    try:
        await fetch(*arguments)
    finally:
        free.put_nowait(fetch)
