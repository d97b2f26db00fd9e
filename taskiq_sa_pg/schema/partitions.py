"""RANGE partitions of the results table, by the time with which task ids of UUID version 7 begin.

Neither making nor dropping one holds others up for long: what waits for a lock gives up after
`Timings.lock`. Of a time to come, ATTACH locks no more than the default partition. DETACH
CONCURRENTLY would block nobody while it waits; PostgreSQL refuses it where there is a default
partition, and without one it refuses results that have other ids.
"""

import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg.database import Database, reason_of
from taskiq_sa_pg.exceptions import ConfigurationError, SchemaError, StorageError
from taskiq_sa_pg.models import TableConfig, primary_key_name, quoted
from taskiq_sa_pg.schema.catalogue import select_partitioned, select_partitions
from taskiq_sa_pg.schema.check import upgrade_commands
from taskiq_sa_pg.schema.families import RESULTS
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

_T = TypeVar("_T")

# A wrong unit would make millions.
_MOST_AT_ONCE: Final = 1_000

_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)

# Bounds as PostgreSQL writes them, and the milliseconds in them.
_TEXT: Final = r"\('([0-9a-f]{12})'\)"
_UUID: Final = r"\('([0-9a-f]{8}-[0-9a-f]{4})-0000-0000-000000000000'\)"

# Danish sorts "aa" behind "z", Welsh "ff" behind "fz", and others take digits for numbers.
_PAIRS: Final = [f"{number:02x}" for number in range(256)]

_NOT_IN_ORDER: Final = (
    "the collation of column task_id of table %s does not sort hex digits as numbers, so its "
    "partitions would mix times"
)

_REMEDIES: Final = {
    "23503": "rows of other tables refer to its results: delete these rows first",
    "23514": "others stored such rows at the same time: run it again",
    "42501": "run this as the owner of the table and of its partitions",
    "42P07": "a table of this name is there, and it is no partition: attach it, or rename it",
    "42P17": "partitions whose bounds are no times are in the way: give them other bounds",
    "55P03": "other transactions hold locks on the table: let them end (pg_stat_activity lists "
    "them), and run it again",
}


class Partition(NamedTuple):
    """The partition of ids from one millisecond since 1970 on to before another."""

    schema: str
    name: str
    start: int
    end: int

    @property
    def starts_at(self) -> datetime:
        """Where it starts."""
        return _EPOCH + self.start * _MILLISECOND

    @property
    def ends_at(self) -> datetime:
        """Where it ends."""
        return _EPOCH + self.end * _MILLISECOND


class InTheWayError(SchemaError):
    """Rows of the default partition belong into a new one, and may not be moved."""


@dataclass(frozen=True)
class Partitioned:
    """A partitioned results table.

    Attributes:
        config: Its name and types.
        schema: Where it is.
        now: The database's clock, in milliseconds since 1970.
        is_uuid: Whether task ids are of type uuid, else they are text.
        columns: The names of the columns that can be given a value.
        partitions: Those whose bounds are times, in their order.
        default: The schema and the name of the default partition.
        has_triggers: Whether triggers act on what is deleted from it.
    """

    config: TableConfig
    schema: str
    now: int
    is_uuid: bool
    columns: tuple[str, ...]
    partitions: tuple[Partition, ...]
    default: tuple[str, str] | None
    has_triggers: bool

    def missing(self, ahead: timedelta, every: timedelta) -> list[Partition]:
        """What has no partition yet, from now on and for the time ahead, in periods of UTC.

        A gap behind the last partition, which comes of a time in which nobody made any, counts.

        Raises:
            ConfigurationError: It is too much.
        """
        step, end = every // _MILLISECOND, self.now + ahead // _MILLISECOND
        start = self.now - self.now % step
        if (end - start) // step >= _MOST_AT_ONCE:
            raise ConfigurationError(
                f"that would be more than {_MOST_AT_ONCE:,} partitions: choose a shorter --ahead, "
                "or a longer --every"
            )
        last = max((each.end for each in self.partitions if each.end <= start), default=start)
        periods = [(last, start), *((each, each + step) for each in range(start, end, step))]
        return [
            Partition(self.schema, _name(self.config, first), first, end)
            for period in periods
            for first, end in self.free(*period)
        ]

    def outdated(self, keep: timedelta) -> list[Partition]:
        """The partitions of which all is older than what is to be kept.

        One that begins with the first of all ids has not been made for a time.
        """
        oldest = self.now - keep // _MILLISECOND
        return [each for each in self.partitions if each.start > 0 and each.end <= oldest]

    def free(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What of a time no partition has."""
        for each in self.partitions:
            if each.end > start and each.start < end:
                if each.start > start:
                    yield start, each.start
                start = each.end
        if start < end:
            yield start, end

    def bound(self, milliseconds: int) -> str | uuid.UUID:
        """The least id of a millisecond."""
        if self.is_uuid:
            return uuid.UUID(int=milliseconds << 80)
        return f"{milliseconds:012x}"


async def find_partitions(database: Database, config: TableConfig) -> Partitioned:
    """The partitions of the results table.

    Raises:
        SchemaError: It is not partitioned by RANGE of task_id, or its collation does not sort ids
            by their time; says what to do.
    """

    async def find(connection: AsyncConnection) -> Partitioned:
        found = await _find(connection, config)
        if not (found.is_uuid or await _sorts_hex(connection, config, found.schema)):
            raise SchemaError(
                f"{_NOT_IN_ORDER % config.qualified_name}. PostgreSQL does not change the column "
                'of a partitioned table: make it again from a table whose task_id has COLLATE "C"'
            )
        return found

    return await database.transact(find, f"find the partitions of table {config.qualified_name}")


async def make_partition(
    database: Database,
    config: TableConfig,
    partition: Partition,
    most_moved: int,
    timings: Timings = DEFAULT_TIMINGS,
) -> int | None:
    """Makes a partition; returns how many rows came from the default one, None if it is there.

    Raises:
        InTheWayError: They would be more than most_moved, or it cannot be; nothing was changed.
        SchemaError: It cannot be made; says what to do.
    """

    async def make(connection: AsyncConnection) -> int | None:
        found = await _find(connection, config)
        if [*found.free(partition.start, partition.end)] != [(partition.start, partition.end)]:
            return None
        names = {
            "parent": _quote(found.schema, config.table_name),
            "new": _quote(partition.schema, partition.name),
            "start": str(found.bound(partition.start)),
            "end": str(found.bound(partition.end)),
        }
        # An identity comes with ATTACH, which refuses another one.
        like = "CREATE TABLE %(new)s (LIKE %(parent)s INCLUDING ALL EXCLUDING IDENTITY)"
        await _run(connection, like, names)
        moved = await _count(connection, found, partition, most_moved + 1)
        if moved > most_moved:
            raise InTheWayError(
                f"more than {most_moved:,} results of the default partition belong into "
                f"{partition.name}. Move them with a larger --move-at-most at a quiet time: "
                "everybody waits until they are moved"
            )
        if moved and found.has_triggers:
            raise InTheWayError(
                f"results of the default partition belong into {partition.name}, and foreign keys "
                "or triggers would act as if they were deleted: drop these before it is made, and "
                "make them again"
            )
        if found.default is not None and (moved or partition.start <= found.now):
            # Whoever waits for the default partition alone goes on with the partitions as they
            # were: he would not find what is moved, and his new results would be refused.
            await _run(connection, "LOCK TABLE ONLY %(parent)s IN ACCESS EXCLUSIVE MODE", names)
            moved = await _move(connection, found, partition)
        attach = (
            "ALTER TABLE %(parent)s ATTACH PARTITION %(new)s "
            "FOR VALUES FROM ('%(start)s') TO ('%(end)s')"
        )
        await _run(connection, attach, names)
        return moved

    return await _take_turns(database, config, make, f"make partition {partition.name}", timings)


async def drop_partition(
    database: Database,
    config: TableConfig,
    partition: Partition,
    timings: Timings = DEFAULT_TIMINGS,
) -> bool:
    """Drops a partition with its rows; False if it is gone.

    Raises:
        SchemaError: It cannot be dropped; says what to do.
    """

    async def drop(connection: AsyncConnection) -> bool:
        found = await _find(connection, config)
        if partition not in found.partitions:
            return False
        names = {
            "parent": _quote(found.schema, config.table_name),
            "old": _quote(partition.schema, partition.name),
        }
        # For foreign keys that refer to the table: DROP would refuse even where no row does.
        await _run(connection, "ALTER TABLE %(parent)s DETACH PARTITION %(old)s", names)
        await _run(connection, "DROP TABLE %(old)s", names)
        return True

    return await _take_turns(database, config, drop, f"drop partition {partition.name}", timings)


async def count_in_the_way(database: Database, found: Partitioned, partition: Partition) -> int:
    """How many rows of the default partition belong into a new one."""

    async def count(connection: AsyncConnection) -> int:
        return await _count(connection, found, partition)

    return await database.transact(count, f"look for rows of partition {partition.name}")


async def _find(connection: AsyncConnection, config: TableConfig) -> Partitioned:
    table = (await connection.execute(select_partitioned(config))).first()
    if table is None:
        raise SchemaError(
            f"table {config.qualified_name} does not exist; make it with "
            f"{upgrade_commands(config, RESULTS)}"
        )
    if table.key is None:
        if not (table.is_uuid or await _sorts_hex(connection, config, table.schema_name)):
            name = _quote(config.schema, config.table_name)
            type_name = config.field_for_task_id.lower()
            raise SchemaError(
                f"{_NOT_IN_ORDER % config.qualified_name}. As its owner, run "
                f'`ALTER TABLE {name} ALTER COLUMN task_id TYPE {type_name} COLLATE "C"` before '
                "you partition it"
            )
        raise SchemaError(
            f"table {config.qualified_name} is not partitioned. As its owner, run `"
            f"{'; '.join(statements_to_partition(config))}`, grant the rights on it again, and "
            "make foreign keys and views on it again"
        )
    if not re.fullmatch(r"RANGE \(task_id( COLLATE .+)?\)", table.key):
        raise SchemaError(
            f"table {config.qualified_name} is partitioned by {table.key}, and partitions of a "
            "time need RANGE (task_id)"
        )
    rows = await connection.execute(select_partitions(config))
    parts = [row for row in rows if row.level == 1]
    default = next((part for part in parts if part.bounds == "DEFAULT"), None)
    return Partitioned(
        config,
        table.schema_name,
        (table.now - _EPOCH) // _MILLISECOND,
        table.is_uuid,
        tuple(table.columns),
        tuple(sorted(_partitions_in(parts, table.is_uuid), key=lambda each: each.start)),
        None if default is None else (default.schema_name, default.name),
        default is not None and default.has_triggers,
    )


def _partitions_in(parts: Sequence[sa.Row[Any]], is_uuid: bool) -> Iterator[Partition]:
    """Those whose bounds are times, and that are plain tables."""
    time = _UUID if is_uuid else _TEXT
    for part in parts:
        bounds = re.fullmatch(f"FOR VALUES FROM {time} TO {time}", part.bounds or "")
        if bounds is not None and part.relkind == "r":
            start, end = (int(each.replace("-", ""), 16) for each in bounds.groups())
            yield Partition(part.schema_name, part.name, start, end)


def statements_to_partition(config: TableConfig) -> list[str]:
    """What makes a partitioned table of a plain one, which becomes its default partition."""
    name, default = config.table_name, config.partition_name("default")
    old = TableConfig(default)
    indexes = {
        primary_key_name(name): primary_key_name(default),
        config.finished_at_index_name: old.finished_at_index_name,
        config.expires_at_index_name: old.expires_at_index_name,
    }
    schema = config.schema
    return [
        "BEGIN",
        f"ALTER TABLE {_quote(schema, name)} RENAME TO {_quote(None, default)}",
        *(
            f"ALTER INDEX {_quote(schema, each)} RENAME TO {_quote(None, new)}"
            for each, new in indexes.items()
        ),
        f"CREATE TABLE {_quote(schema, name)} (LIKE {_quote(schema, default)} INCLUDING ALL) "
        "PARTITION BY RANGE (task_id)",
        f"ALTER TABLE {_quote(schema, name)} ATTACH PARTITION {_quote(schema, default)} DEFAULT",
        "COMMIT",
    ]


async def _sorts_hex(connection: AsyncConnection, config: TableConfig, schema: str) -> bool:
    table = sa.table(config.table_name, sa.column("task_id"), schema=schema)
    digits = sa.func.unnest(sa.literal(_PAIRS, ARRAY(sa.Text)), type_=sa.Text)
    # The collation of a union is that of the column.
    of_column = sa.cast(table.c.task_id, sa.Text)
    pairs = sa.union_all(sa.select(of_column.label("pair")).where(sa.false()), sa.select(digits))
    pair = pairs.subquery().c.pair
    in_order = await connection.scalar(sa.select(sa.func.array_agg(aggregate_order_by(pair, pair))))
    return bool(in_order == _PAIRS)


async def _count(
    connection: AsyncConnection, found: Partitioned, partition: Partition, most: int | None = None
) -> int:
    if found.default is None:
        return 0
    default, belongs = _in_the_way(found, partition)
    rows = sa.select(default.c.task_id).where(belongs).limit(most).subquery()
    return await connection.scalar(sa.select(sa.func.count()).select_from(rows)) or 0


async def _move(connection: AsyncConnection, found: Partitioned, partition: Partition) -> int:
    default, belongs = _in_the_way(found, partition)
    moved = sa.delete(default).where(belongs).returning(*default.c).cte("moved")
    new = _table(found, partition.schema, partition.name)
    rows = sa.insert(new).from_select(found.columns, sa.select(*moved.c))
    counted = rows.execution_options(preserve_rowcount=True)
    return (await connection.execute(counted)).rowcount


def _in_the_way(
    found: Partitioned, partition: Partition
) -> tuple[sa.TableClause, sa.ColumnElement[bool]]:
    """The default partition, and whether a row of it belongs into another one."""
    assert found.default is not None
    default = _table(found, *found.default)
    start, end = (
        sa.literal(found.bound(each), sa.Uuid() if found.is_uuid else sa.Text())
        for each in (partition.start, partition.end)
    )
    return default, (default.c.task_id >= start) & (default.c.task_id < end)


def _table(found: Partitioned, schema: str, name: str) -> sa.TableClause:
    return sa.table(name, *map(sa.column, found.columns), schema=schema)


async def _take_turns(
    database: Database,
    config: TableConfig,
    work: Callable[[AsyncConnection], Awaitable[_T]],
    purpose: str,
    timings: Timings,
) -> _T:
    async def run(connection: AsyncConnection) -> _T:
        # That of the schema's steps.
        key = sa.func.hashtextextended(f"taskiq_sa_pg {config.table_name}", 0)
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
        limit = f"{timings.lock * 1000:.0f}ms"
        await connection.execute(sa.select(sa.func.set_config("lock_timeout", limit, True)))
        return await work(connection)

    try:
        # Without a limit: rows may have to be moved, and the default partition to be read.
        return await database.transact(run, purpose, is_limited=False)
    except StorageError as exc:
        remedy = _REMEDIES.get(exc.sqlstate or "")
        if remedy is None or not isinstance(exc.__cause__, Exception):
            raise
        raise SchemaError(f"cannot {purpose}: {reason_of(exc.__cause__)}; {remedy}") from exc


async def _run(connection: AsyncConnection, statement: str, names: dict[str, str]) -> None:
    await connection.execute(sa.DDL(statement, context=names))  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare


def _name(config: TableConfig, start: int) -> str:
    starts_at = _EPOCH + start * _MILLISECOND
    is_midnight = starts_at == starts_at.replace(hour=0, minute=0, second=0, microsecond=0)
    return config.partition_name(
        f"{starts_at:p%Y%m%d}" if is_midnight else f"{starts_at:p%Y%m%d_%H%M%S}"
    )


def _quote(schema: str | None, name: str) -> str:
    # With named parameters no percent sign is doubled: the DDL does that.
    dialect = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    place = None if schema is None else quoted(schema)
    return str(dialect.identifier_preparer.format_table(sa.table(quoted(name), schema=place)))
