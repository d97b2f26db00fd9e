"""What a task is at, from its being sent to its result: the status table, written and read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, get_args

from taskiq_sa_pg.batching import Batcher, Entry
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.layout import Layout
from taskiq_sa_pg.row_parameters import arrays_of
from taskiq_sa_pg.rows import StatusRow, StoredStatus
from taskiq_sa_pg.statements import MAX_IDS_PER_READ
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.telemetry import Telemetry

Track = Literal["started"]

Unfinished = Literal["queued", "started", "retrying"]
State = Literal["unknown", Unfinished, "succeeded", "failed", "expired"]

# What can be written; "unknown" deletes.
_WRITTEN: Final = (*get_args(Unfinished), "unknown")

# Seconds. A task waits for it, and has more important things to do.
RETRY_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """What a task is at.

    Attributes:
        task_id: The task.
        state: "queued" since queued_at; "started" at started_at by worker; "retrying", sent again
            or to be sent again after a failure; "succeeded", "failed" at finished_at; "expired",
            which was one of these; "unknown" if there is nothing of it.
        task_name: Its name.
        attempt: 0 for the first, and one more with each of taskiq's retries.
        queued_at: When this attempt was sent, by the sender's clock.
        started_at: When it was last started, by the worker's clock.
        finished_at: When its result was stored, by the database's clock.
        worker: Who executed it last.
    """

    task_id: str
    state: State
    task_name: str | None = None
    attempt: int = 0
    queued_at: datetime | None = None
    started_at: datetime | None = None
    worker: str | None = None
    finished_at: datetime | None = None


class Tracking:
    """Writes and reads the status table, gathered; made for one event loop.

    Task ids come as the column has them, beside those that were given, which errors name.

    Args:
        store: Where the statements run.
        layout: The tables.
        telemetry: Counts what is done.
    """

    def __init__(self, store: Store, layout: Layout, telemetry: Telemetry) -> None:
        self._store = store
        self._layout = layout
        self._table = layout.models.config.qualified_name
        self._written: Batcher[Any, StatusRow, StatusRow, None] = Batcher(
            self._write,
            encode=lambda _, row: row,
            rank=lambda row: row.attempt,
            meter=telemetry.meters["set_status"],
        )
        self._read: Batcher[Any, str, str, StoredStatus] = Batcher(
            self._read_batch,
            encode=lambda _, task_id: task_id,
            max_rows=MAX_IDS_PER_READ,
            meter=telemetry.meters["get_status"],
        )

    async def close(self) -> None:
        """Refuses further calls, and returns when those before have been answered."""
        await self._written.close()
        await self._read.close()

    async def write(self, column_id: Any, status: TaskStatus) -> None:
        """Stores a status; "unknown" forgets it. A later attempt's stays."""
        row = StatusRow(
            column_id,
            status.state,
            status.task_name,
            status.attempt,
            _seconds(status.queued_at),
            _seconds(status.started_at),
            status.worker,
        )
        await self._written.submit(column_id, row, status.task_id)

    async def read(self, column_id: Any, task_id: str) -> TaskStatus:
        """What a task is at."""
        stored = await self._read.submit(column_id, task_id, task_id)
        return TaskStatus(task_id, "unknown") if stored is None else _status_of(task_id, stored)

    async def read_running(self, limit: int) -> list[TaskStatus]:
        """The tasks that are executed, the longest first."""

        async def read() -> Sequence[Any]:
            if not self._layout.features.has_status:
                return []
            purpose = f"list the running tasks of table {self._table}"
            statement = self._layout.status_statements.select_running
            return await self._store.fetch(statement, {"limit": limit}, purpose)

        rows = await self._layout.adapting(read, uses_status=True)
        return [_status_of(str(row[0]), StoredStatus._make(row)) for row in rows]

    async def _write(self, batch: Mapping[Any, Entry[StatusRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]

        async def write() -> None:
            if self._layout.features.has_status:
                await self._upsert_all([row for row in rows if row.state != "unknown"])
                await self._delete_all([row for row in rows if row.state == "unknown"])

        await self._layout.adapting(write, uses_status=True)
        return {}

    async def _upsert_all(self, rows: Sequence[StatusRow]) -> None:
        purpose = f"store its status in table {self._table}_status"
        if rows:
            for statement, parameters in self._layout.status_statements.upsert.of(rows):
                await self._store.fetch(statement, parameters, purpose, retry_timeout=RETRY_TIMEOUT)

    async def _delete_all(self, rows: Sequence[StatusRow]) -> None:
        if rows:
            await self._store.fetch(
                self._layout.status_statements.delete,
                arrays_of(("task_id", "attempt"), [(row.task_id, row.attempt) for row in rows]),
                f"delete its status from table {self._table}_status",
                retry_timeout=RETRY_TIMEOUT,
            )

    async def _read_batch(self, batch: Mapping[Any, Entry[str]]) -> Mapping[Any, StoredStatus]:
        purpose = f"read the status of tasks of table {self._table}"
        rows = await self._layout.adapting(
            lambda: self._store.fetch(
                self._layout.status_statements.select_statuses, {"task_ids": list(batch)}, purpose
            ),
            uses_status=True,
        )
        return {row[0]: StoredStatus._make(row) for row in rows}


def check_status(status: TaskStatus) -> None:
    """Refuses what set_status() cannot store.

    Raises:
        ConfigurationError: A state that only a result can give.
    """
    if status.state not in _WRITTEN:
        raise ConfigurationError(
            f"the state must be one of {', '.join(map(repr, _WRITTEN))}, not {status.state!r}: "
            "the others come from results"
        )


def _seconds(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()


def _status_of(task_id: str, stored: StoredStatus) -> TaskStatus:
    # Drivers give times in various zones.
    values: dict[str, Any] = {
        name: value.astimezone(UTC) if isinstance(value, datetime) else value
        for name, value in stored._asdict().items()
    }
    return TaskStatus(**values | {"task_id": task_id})
