"""Tables with a million rows as set_result writes them, and the bytes that these take."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import asyncpg
from sqlalchemy import (
    Double,
    Insert,
    Integer,
    Text,
    bindparam,
    case,
    cast,
    func,
    literal,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.sql.elements import ColumnElement

from benchmarks.contenders import make_payload, make_result
from taskiq_sa_pg import Models, SQLAlchemyResultBackend
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.engines import make_engine
from taskiq_sa_pg.metadata import Metadata, attach
from taskiq_sa_pg.mixins import as_interval
from taskiq_sa_pg.rows import METADATA_COLUMNS, ResultRow
from taskiq_sa_pg.statements import select_results

PAYLOAD_BYTES: Final = 200
SECONDS_BETWEEN: Final = 0.001  # from one result to the next

_A_DAY: Final = 86_400

_SIZES: Final = """
    SELECT pg_relation_size(c.oid) AS heap,
        coalesce(pg_total_relation_size(nullif(c.reltoastrelid, 0)), 0) AS toast,
        sum(pg_relation_size(i.indexrelid)) FILTER (WHERE i.indisprimary)::bigint AS primary_key,
        sum(pg_relation_size(i.indexrelid)) FILTER (WHERE NOT i.indisprimary)::bigint AS indexes
    FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid
    WHERE c.oid = $1::regclass
    GROUP BY c.oid, c.reltoastrelid
"""


class Variant(NamedTuple):
    """What the rows have; with `is_mixed` every second one has expired."""

    name: str
    has_metadata: bool = False
    has_ttl: bool = False
    is_mixed: bool = False


PLAIN: Final = Variant("neither")
VARIANTS: Final = (
    PLAIN,
    Variant("`result_ttl`", has_ttl=True),
    Variant("metadata", has_metadata=True),
    Variant("both", has_metadata=True, has_ttl=True),
)
HALF_EXPIRED: Final = Variant("half expired", has_metadata=True, has_ttl=True, is_mixed=True)


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes a row, by what its table consists of."""

    variant: str
    heap: float
    primary_key: float
    indexes: float
    toast: float

    @property
    def total(self) -> float:
        return self.heap + self.primary_key + self.indexes + self.toast


@dataclass(frozen=True, slots=True)
class Tables:
    """Makes and fills the tables of one database."""

    dsn: str
    engine: AsyncEngine
    connection: asyncpg.Connection

    async def make(self, table_name: str) -> Models:
        backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
            self.dsn, table_name=table_name, run_migrations=True
        )
        await backend.startup()
        await backend.shutdown()
        return backend.models

    async def fill(self, models: Models, numbers: range, variant: Variant = PLAIN) -> None:
        """With results of the tasks that id_of() makes of the numbers; vacuums and analyzes."""
        ends = {"first": numbers[0], "last": numbers[-1]}
        async with self.engine.begin() as connection:
            await connection.execute(_fill(models, variant), ends)
        await self.connection.execute(f"VACUUM (ANALYZE) {models.config.table_name}")
        await self.checkpoint()

    async def checkpoint(self) -> None:
        await self.connection.execute("CHECKPOINT")

    async def warm(self, models: Models, numbers: range) -> None:
        """Has PostgreSQL hold these results in its memory, as those that were stored just now."""
        async with self.engine.connect() as connection:
            task_ids = [id_of(number) for number in numbers]
            await connection.execute(select_results(models), {"task_ids": task_ids})

    async def truncate(self, models: Models) -> None:
        await self.connection.execute(f"TRUNCATE {models.config.table_name}")

    async def drop(self, models: Models) -> None:
        name = models.config.table_name
        tables = [f"{name}{suffix}" for suffix in ("", "_progress", "_status", "_version")]
        await self.connection.execute(f"DROP TABLE {', '.join(tables)}")


@asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[Tables]:
    engine = make_engine(dsn)
    connection = await asyncpg.connect(dsn)
    try:
        yield Tables(dsn, engine, connection)
    finally:
        await connection.close()
        await engine.dispose()


def id_of(number: int) -> str:
    """32 hexadecimal digits in no order, as those of uuid4().hex."""
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()


async def measure_sizes(tables: Tables, rows: int) -> list[Size]:
    sizes = []
    for number, variant in enumerate(VARIANTS):
        print(f"sizes: {rows:,} rows with {variant.name}", flush=True)
        models = await tables.make(f"large_sizes_{number}")
        await tables.fill(models, range(rows), variant)
        found = await tables.connection.fetchrow(_SIZES, models.config.table_name)
        sizes.append(Size(variant.name, **{name: size / rows for name, size in found.items()}))
        await tables.drop(models)
    return sizes


def _fill(models: Models, variant: Variant) -> Insert:
    first, last = bindparam("first", type_=Integer), bindparam("last", type_=Integer)
    number = func.generate_series(first, last).column_valued("number")
    finished_at = func.now() - as_interval(cast(last - number, Double) * SECONDS_BETWEEN)
    values: dict[str, ColumnElement[Any]] = {
        **_constants(models, variant),
        "task_id": func.md5(cast(number, Text)),
        "finished_at": finished_at,
    }
    if variant.has_ttl:
        # A day ago or in a day, in the order in which they were finished.
        ttl = case((number % 2 == 0, -_A_DAY), else_=_A_DAY) if variant.is_mixed else _A_DAY
        values["expires_at"] = finished_at + as_interval(cast(ttl, Double))
    if variant.has_metadata:
        values["queued_at"] = values["started_at"] = finished_at - text("interval '10 ms'")
    return insert(models.results_table).from_select(list(values), select(*values.values()))


def _constants(models: Models, variant: Variant) -> dict[str, ColumnElement[Any]]:
    result = make_result(make_payload(PAYLOAD_BYTES))
    if variant.has_metadata:
        attach(result, Metadata("shop.tasks:send_receipt", worker="worker-1.example.com:12345"))
    row: ResultRow = Codec(models.config).encode_result("", result)
    columns = models.results_table.c
    values: dict[str, ColumnElement[Any]] = {
        name: cast(literal(value, Text), JSONB)
        if isinstance(columns[name].type, JSONB)
        else literal(value, columns[name].type)
        for name, value in row._asdict().items()
        if value is not None and name != "task_id"
    }
    assert variant.has_metadata or not values.keys() & set(METADATA_COLUMNS)
    return values
