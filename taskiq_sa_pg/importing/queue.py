"""Moves tasks of taskiq-postgres' broker into our queue, one slice after the other.

One transaction per slice deletes messages from the old table and inserts them into ours. The move
can be interrupted and repeated, and no task is lost or moved twice.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncConnection
from taskiq import BrokerMessage

from taskiq_sa_pg.batching import MAX_BYTES, MAX_ROWS
from taskiq_sa_pg.broker import QueueSettings, row_of
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError, InvalidTaskIdError, SchemaError
from taskiq_sa_pg.models import quoted
from taskiq_sa_pg.schema import describe_columns
from taskiq_sa_pg.statements import OldTask, insert_old_tasks, select_queued

_PENDING: Final = "pending"
_PROCESSING: Final = "processing"

_TEXTS: Final = frozenset({"text", "character varying"})
_COLUMNS: Final[Mapping[str, frozenset[str]]] = {
    "id": frozenset({"integer", "bigint"}),
    "task_id": _TEXTS,
    "task_name": _TEXTS,
    "message": _TEXTS,
    "labels": frozenset({"jsonb"}),
    "status": _TEXTS,
    "created_at": frozenset({"timestamp with time zone"}),
}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A message that stays in the old table, and why."""

    task_id: str
    reason: str


@dataclass(slots=True)
class QueueImportReport:
    """Counts of the messages of an old table.

    Attributes:
        messages: Messages read.
        moved: Tasks moved into our queue; with dry_run, tasks that would be moved.
        already_there: Messages whose task id our queue already had.
        superseded: Messages that a later message with the same task id replaced.
        left_out: Messages that our queue cannot store; they stay in the old table.
        processing: Messages left that a worker had taken.
        oldest: When the oldest of the messages read was sent; None if there are none.
    """

    messages: int = 0
    moved: int = 0
    already_there: int = 0
    superseded: int = 0
    left_out: int = 0
    processing: int = 0
    oldest: datetime | None = None


class _Message(NamedTuple):
    """A row of the old table, in the order of _Statements.read."""

    id: int
    task_id: str
    task_name: str
    message: str
    labels: str
    sent_at: datetime
    age: float


@dataclass(slots=True)
class _Slice:
    """The messages of one slice, and what was done with them."""

    messages: list[_Message]
    tasks: dict[Any, OldTask] = field(default_factory=dict)
    stored: set[Any] = field(default_factory=set)
    superseded: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    done_with: list[int] = field(default_factory=list)


async def import_queue(
    settings: QueueSettings,
    database: Database,
    from_table: str,
    *,
    announce: Callable[[Collection[str]], None],
    from_schema: str | None = None,
    since: datetime | None = None,
    processing: bool = False,
    keep: bool = False,
    dry_run: bool = False,
    on_left_out: Callable[[LeftOut], None] = lambda _: None,
) -> QueueImportReport:
    """Moves the messages of taskiq-postgres' broker into our queue.

    Tasks keep their due times and their order. Of several messages with the same task id, such as
    retries, the last one is moved and the others are deleted. If our queue already has the task
    id, its message is kept.

    Args:
        settings: Settings of our broker; its default queue gets tasks without the label
            queue_name.
        database: The database of both tables.
        from_table: Name of the old table, case-sensitive.
        announce: Called with the names of the queues that received tasks.
        from_schema: PostgreSQL schema of the old table. None uses the search_path.
        since: Skip messages that were sent earlier.
        processing: Also move messages that a worker has taken and may still execute.
        keep: Do not change the old table. A repeated run then imports executed tasks again.
        dry_run: Count only, and change nothing.
        on_left_out: Called for each message that our queue cannot store.

    Raises:
        SchemaError: The table does not exist, or is not a table of taskiq-postgres' broker.
        StorageError: PostgreSQL rejected a statement or is unreachable. Committed slices are kept,
            and the next run continues from there.
    """
    name = from_table if from_schema is None else f"{from_schema}.{from_table}"
    purpose = f"move the tasks of table {name} into table {settings.table}"
    await _check_old_table(database, from_table, from_schema, name)
    old = _Statements(from_table, from_schema, since, is_any=processing)
    queue, report = _Queue(settings, old, keep=keep, dry_run=dry_run), QueueImportReport()
    latest = await _find_latest(database, old, purpose)
    last = 0
    while picked := await database.fetch(old.pick, {"last": last}, purpose):
        ids = [row[0] for row in picked]
        last = ids[-1]

        async def move(connection: AsyncConnection, ids: list[int] = ids) -> _Slice:
            return await queue.move(connection, ids, latest)

        moved = await database.transact(move, purpose)
        _add(report, moved)
        for each in moved.left_out:
            on_left_out(each)
        if moved.stored and not dry_run:
            announce({moved.tasks[task_id].queue_name for task_id in moved.stored})
    [[report.processing]] = await database.fetch(old.count_processing, {}, purpose)
    return report


async def _find_latest(database: Database, old: "_Statements", purpose: str) -> dict[str, int]:
    """The last message of each task id that has several messages."""

    async def find(connection: AsyncConnection) -> dict[str, int]:
        return {row[0]: row[1] for row in await connection.execute(old.latest)}

    # It reads the whole table, which may exceed the usual time limit of a statement.
    return await database.transact(find, purpose, is_limited=False)


def _add(report: QueueImportReport, moved: _Slice) -> None:
    report.messages += len(moved.messages)
    report.moved += len(moved.stored)
    report.superseded += moved.superseded
    report.left_out += len(moved.left_out)
    report.already_there += (
        len(moved.messages) - len(moved.stored) - moved.superseded - len(moved.left_out)
    )
    times = [each.sent_at for each in moved.messages]
    report.oldest = min([*times, *filter(None, [report.oldest])], default=None)


class _Queue:
    """Our queue, which receives slices of the old one."""

    def __init__(
        self, settings: QueueSettings, old: "_Statements", *, keep: bool, dry_run: bool
    ) -> None:
        self._settings = settings
        self._old = old
        self._insert = insert_old_tasks(settings.queue_table)
        self._select_queued = select_queued(settings.queue_table)
        self._keep = keep
        self._dry_run = dry_run

    async def move(
        self, connection: AsyncConnection, ids: list[int], latest: Mapping[str, int]
    ) -> _Slice:
        read = self._old.read if self._dry_run or self._keep else self._old.lock
        rows = await connection.execute(read, {"ids": ids})
        moved = _Slice([_Message._make(row) for row in rows])
        for message in moved.messages:
            if latest.get(message.task_id, 0) > message.id:
                moved.superseded += 1
            else:
                try:
                    task = _task_of(self._settings, message)
                except (ConfigurationError, InvalidTaskIdError, ValueError) as exc:
                    reason = " ".join(str(exc).split())
                    moved.left_out.append(LeftOut(message.task_id, reason))
                    continue
                moved.tasks[task.task_id] = task
            moved.done_with.append(message.id)
        if self._dry_run:
            there = await connection.execute(self._select_queued, {"task_ids": list(moved.tasks)})
            moved.stored = moved.tasks.keys() - set(there.scalars())
            return moved
        if moved.tasks:
            for call in self._insert.of(list(moved.tasks.values())):
                moved.stored.update((await connection.execute(*call)).scalars())
        if moved.done_with and not self._keep:
            await connection.execute(self._old.delete, {"ids": moved.done_with})
        return moved


class _Statements:
    """Statements on the old table; ids are passed as the array `ids`."""

    def __init__(
        self, table_name: str, schema: str | None, since: datetime | None, *, is_any: bool
    ) -> None:
        old = sa.table(
            quoted(table_name),
            sa.column("id", sa.BigInteger()),
            *[sa.column(name, sa.Text()) for name in ("task_id", "task_name", "message")],
            sa.column("labels", JSONB()),
            sa.column("status", sa.Text()),
            sa.column("created_at", sa.DateTime(timezone=True)),
            schema=None if schema is None else quoted(schema),
        )
        sent_at = sa.func.coalesce(old.c.created_at, sa.func.now())
        states = [_PENDING, _PROCESSING] if is_any else [_PENDING]
        wanted: list[sa.ColumnElement[bool]] = [old.c.status.in_(states)]
        if since is not None:
            wanted.append(sent_at >= since)
        is_asked_for = old.c.id == sa.any_(sa.bindparam("ids", type_=ARRAY(sa.BigInteger)))
        last_id = sa.func.max(old.c.id)
        self.latest = (
            sa.select(old.c.task_id, last_id)
            .where(*wanted)
            .group_by(old.c.task_id)
            .having(sa.func.min(old.c.id) < last_id)
        )
        self.pick = _pick(old, wanted)
        self.read = (
            sa.select(
                *[old.c[name] for name in ("id", "task_id", "task_name", "message")],
                sa.cast(old.c.labels, sa.Text),
                sent_at,
                sa.cast(sa.extract("epoch", sa.func.now() - sent_at), sa.Double),
            )
            # Checked again, because an old worker may have taken a message in between.
            .where(is_asked_for, *wanted)
            .order_by(old.c.id)
        )
        self.lock = self.read.with_for_update()
        self.delete = sa.delete(old).where(is_asked_for)
        self.count_processing = sa.select(sa.func.count(old.c.id)).where(
            old.c.status == _PROCESSING
        )


def _pick(old: sa.TableClause, wanted: Sequence[sa.ColumnElement[bool]]) -> sa.Select[Any]:
    """The ids of the next slice, bounded in rows and bytes."""
    size = sa.func.octet_length(old.c.message)
    size_before = (sa.func.sum(size).over(order_by=old.c.id) - size).label("size_before")
    rows = (
        sa.select(old.c.id, size_before)
        .where(old.c.id > sa.bindparam("last", type_=sa.BigInteger), *wanted)
        .order_by(old.c.id)
        .limit(MAX_ROWS)
        .subquery("rows")
    )
    return sa.select(rows.c.id).where(rows.c.size_before < MAX_BYTES).order_by(rows.c.id)


def _task_of(settings: QueueSettings, message: _Message) -> OldTask:
    labels = json.loads(message.labels)
    if not isinstance(labels, dict):
        raise ConfigurationError("its labels are not a JSON object")
    row = row_of(
        settings,
        BrokerMessage(
            task_id=message.task_id,
            task_name=message.task_name,
            message=message.message.encode(),
            labels=labels,
        ),
    )
    # Due since it was sent, so that the order is kept and a delay does not start again.
    due = row._replace(available_at=row.available_at - message.age)
    return OldTask(**due._asdict(), queued_at=message.sent_at)


async def _check_old_table(
    database: Database, table_name: str, schema: str | None, name: str
) -> None:
    async def describe(connection: AsyncConnection) -> dict[str, str]:
        rows = await connection.execute(describe_columns([table_name], schema))
        return {row.column_name: row.type_name for row in rows}

    types = await database.transact(describe, f"check table {name}")
    if not types:
        raise SchemaError(
            f"table {name} does not exist: pass the exact name of the old table, and its schema if "
            "that is not in the search_path"
        )
    if any(types.get(column) not in known for column, known in _COLUMNS.items()):
        found = ", ".join(f"{column} {type_name}" for column, type_name in types.items())
        raise SchemaError(
            f"table {name} is not a table of taskiq-postgres' broker, which has the columns "
            f"{', '.join(_COLUMNS)}. It has {found}"
        )
