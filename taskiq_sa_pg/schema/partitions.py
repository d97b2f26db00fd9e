"""RANGE partitions of the results table, by the time at the beginning of UUIDv7 task ids.

Creating or dropping a partition blocks other statements only briefly: waiting for a lock ends after
`Timings.lock`. For a future time, ATTACH locks only the default partition. DETACH CONCURRENTLY
would not block while it waits, but PostgreSQL refuses it if there is a default partition; without
a default partition, results with other ids could not be stored.
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

# A wrong unit would create millions.
_MOST_AT_ONCE: Final = 1_000

_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)

# Bounds as PostgreSQL writes them, and the milliseconds in them.
_TEXT: Final = r"\('([0-9a-f]{12})'\)"
_UUID: Final = r"\('([0-9a-f]{8}-[0-9a-f]{4})-0000-0000-000000000000'\)"

# Danish sorts "aa" after "z", Welsh "ff" after "fz", and other collations sort digits as numbers.
_PAIRS: Final = [f"{number:02x}" for number in range(256)]

_NOT_IN_ORDER: Final = (
    "the collation of column task_id of table %s does not sort hex digits by value, so partitions "
    "would not match times"
)

_REMEDIES: Final = {
    "23503": "rows of other tables refer to its results: delete these rows first",
    "23514": "such rows were stored at the same time: run it again",
    "42501": "run this as the owner of the table and of its partitions",
    "42P07": "a table of this name exists and is not a partition: attach it, or rename it",
    "42P17": "the bounds of an existing partition are not times: change them",
    "55P03": "other transactions hold locks on the table: wait until they end (pg_stat_activity "
    "lists them), and run it again",
}


class Partition(NamedTuple):
    """The partition of ids from `start` to before `end`, in milliseconds since 1970 (UTC)."""

    schema: str
    name: str
    start: int
    end: int

    @property
    def starts_at(self) -> datetime:
        """The first moment of the partition."""
        return _EPOCH + self.start * _MILLISECOND

    @property
    def ends_at(self) -> datetime:
        """The first moment after the partition."""
        return _EPOCH + self.end * _MILLISECOND


class InTheWayError(SchemaError):
    """Rows of the default partition belong to a new one, and must not be moved."""


@dataclass(frozen=True)
class Partitioned:
    """A partitioned results table.

    Attributes:
        config: Its name and types.
        schema: Its schema.
        now: The database's clock, in milliseconds since 1970.
        is_uuid: Whether task ids are of type uuid; otherwise they are text.
        columns: The names of the columns that are not generated.
        partitions: Those whose bounds are times, in order.
        default: The schema and name of the default partition; None if there is none.
        has_triggers: Whether deleting from the default partition fires triggers.
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
        """The partitions to create, of periods of length `every` in UTC, from now to `ahead`.

        A gap between the last past partition and now is included.

        Raises:
            ConfigurationError: There would be too many.
        """
        step, end = every // _MILLISECOND, self.now + ahead // _MILLISECOND
        start = self.now - self.now % step
        if (end - start) // step >= _MOST_AT_ONCE:
            raise ConfigurationError(
                f"this would create more than {_MOST_AT_ONCE:,} partitions: choose a shorter "
                "--ahead or a longer --every"
            )
        last = max((each.end for each in self.partitions if each.end <= start), default=start)
        periods = [(last, start), *((each, each + step) for each in range(start, end, step))]
        return [
            Partition(self.schema, _name(self.config, first), first, end)
            for period in periods
            for first, end in self.free(*period)
        ]

    def outdated(self, keep: timedelta) -> list[Partition]:
        """The partitions that are entirely older than `keep`.

        A partition that starts at the lowest id is excluded: it was not created for a period.
        """
        oldest = self.now - keep // _MILLISECOND
        return [each for each in self.partitions if each.start > 0 and each.end <= oldest]

    def free(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a period that are not in any partition."""
        for each in self.partitions:
            if each.end > start and each.start < end:
                if each.start > start:
                    yield start, each.start
                start = each.end
        if start < end:
            yield start, end

    def bound(self, milliseconds: int) -> str | uuid.UUID:
        """The lowest id of a millisecond."""
        if self.is_uuid:
            return uuid.UUID(int=milliseconds << 80)
        return f"{milliseconds:012x}"


async def find_partitions(database: Database, config: TableConfig) -> Partitioned:
    """Finds the partitions of the results table.

    Raises:
        SchemaError: It is not partitioned by RANGE (task_id), or its collation does not sort ids
            by time; names the remedy.
    """
    purpose = f"find the partitions of table {config.qualified_name}"
    found = await database.transact(lambda connection: _find(connection, config), purpose)
    # In another transaction: to lock the table after its partitions may be a deadlock with
    # processes that create some.
    if not found.is_uuid and not await database.transact(
        lambda connection: sorts_hex(connection, config, found.schema), purpose
    ):
        raise SchemaError(
            f"{_NOT_IN_ORDER % config.qualified_name}. PostgreSQL cannot change this column of "
            'a partitioned table: create it again from a table whose task_id has COLLATE "C"'
        )
    return found


async def make_partition(
    database: Database,
    config: TableConfig,
    partition: Partition,
    most_moved: int,
    timings: Timings = DEFAULT_TIMINGS,
) -> int | None:
    """Creates a partition, and moves its rows from the default partition.

    Returns:
        The number of rows moved; None if the partition exists.

    Raises:
        InTheWayError: More than most_moved rows would have to be moved, or triggers prevent it;
            nothing was changed.
        SchemaError: The partition cannot be created; names the remedy.
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
        # ATTACH adds an identity, and refuses a table that has one.
        like = "CREATE TABLE %(new)s (LIKE %(parent)s INCLUDING ALL EXCLUDING IDENTITY)"
        await _run(connection, like, names)
        moved = await _count(connection, found, partition, most_moved + 1)
        if moved > most_moved:
            raise InTheWayError(
                f"more than {most_moved:,} results of the default partition belong to "
                f"{partition.name}. Move them with a larger --move-at-most at a quiet time: "
                "all other statements on the table wait meanwhile"
            )
        if moved and found.has_triggers:
            raise InTheWayError(
                f"results of the default partition belong to {partition.name}, and moving them "
                "would fire foreign keys or triggers as if they were deleted: drop these first, "
                "and create them again afterwards"
            )
        if found.default is not None and (moved or partition.start <= found.now):
            # A statement that waits for the lock on the default partition alone continues with
            # the old partitions: it would not find moved rows, and could not store new ones.
            await _run(connection, "LOCK TABLE ONLY %(parent)s IN ACCESS EXCLUSIVE MODE", names)
            moved = await _move(connection, found, partition)
        attach = (
            "ALTER TABLE %(parent)s ATTACH PARTITION %(new)s "
            "FOR VALUES FROM ('%(start)s') TO ('%(end)s')"
        )
        await _run(connection, attach, names)
        return moved

    return await _take_turns(database, config, make, f"create partition {partition.name}", timings)


async def drop_partition(
    database: Database,
    config: TableConfig,
    partition: Partition,
    timings: Timings = DEFAULT_TIMINGS,
) -> bool:
    """Drops a partition with its rows; returns False if it does not exist.

    Raises:
        SchemaError: It cannot be dropped; names the remedy.
    """

    async def drop(connection: AsyncConnection) -> bool:
        found = await _find(connection, config)
        if partition not in found.partitions:
            return False
        names = {
            "parent": _quote(found.schema, config.table_name),
            "old": _quote(partition.schema, partition.name),
        }
        # DROP refuses if a foreign key refers to the table, even without such rows; so detach it.
        await _run(connection, "ALTER TABLE %(parent)s DETACH PARTITION %(old)s", names)
        await _run(connection, "DROP TABLE %(old)s", names)
        return True

    return await _take_turns(database, config, drop, f"drop partition {partition.name}", timings)


async def count_in_the_way(database: Database, found: Partitioned, partition: Partition) -> int:
    """The number of rows of the default partition that belong to a new one."""

    async def count(connection: AsyncConnection) -> int:
        return await _count(connection, found, partition)

    return await database.transact(count, f"count the rows for partition {partition.name}")


async def _find(connection: AsyncConnection, config: TableConfig) -> Partitioned:
    table = (await connection.execute(select_partitioned(config))).first()
    if table is None:
        raise SchemaError(
            f"table {config.qualified_name} does not exist; create it with "
            f"{upgrade_commands(config, RESULTS)}"
        )
    if table.key is None:
        if not (table.is_uuid or await sorts_hex(connection, config, table.schema_name)):
            name = _quote(config.schema, config.table_name)
            type_name = config.field_for_task_id.lower()
            raise SchemaError(
                f"{_NOT_IN_ORDER % config.qualified_name}. As its owner, run "
                f'`ALTER TABLE {name} ALTER COLUMN task_id TYPE {type_name} COLLATE "C"` before '
                "you partition it"
            )
        raise SchemaError(
            f"table {config.qualified_name} is not partitioned. As its owner, run `"
            f"{'; '.join(statements_to_partition(config))}`, then grant the privileges on it "
            "again, and create foreign keys and views on it again"
        )
    if not re.fullmatch(r"RANGE \(task_id( COLLATE .+)?\)", table.key):
        raise SchemaError(
            f"table {config.qualified_name} is partitioned by {table.key}, but partitions by time "
            "need RANGE (task_id)"
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
    """The partitions whose bounds are times, and that are plain tables."""
    time = _UUID if is_uuid else _TEXT
    for part in parts:
        bounds = re.fullmatch(f"FOR VALUES FROM {time} TO {time}", part.bounds or "")
        if bounds is not None and part.relkind == "r":
            start, end = (int(each.replace("-", ""), 16) for each in bounds.groups())
            yield Partition(part.schema_name, part.name, start, end)


def statements_to_partition(config: TableConfig) -> list[str]:
    """The SQL that turns a plain table into the default partition of a new partitioned table."""
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


async def sorts_hex(connection: AsyncConnection, config: TableConfig, schema: str) -> bool:
    """Whether the collation of the task ids sorts hexadecimal digits by their values."""
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
    """The default partition, and the condition for its rows that belong to another one."""
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
        # The same lock as for the schema's steps.
        key = sa.func.hashtextextended(f"taskiq_sa_pg {config.table_name}", 0)
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
        limit = f"{timings.lock * 1000:.0f}ms"
        await connection.execute(sa.select(sa.func.set_config("lock_timeout", limit, True)))
        return await work(connection)

    try:
        # Without a limit: it may move rows, and has to read the default partition.
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
    # With named parameters, percent signs are not doubled here: sa.DDL does that.
    dialect = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
    place = None if schema is None else quoted(schema)
    return str(dialect.identifier_preparer.format_table(sa.table(quoted(name), schema=place)))
