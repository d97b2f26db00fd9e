"""The status of tasks, from sending to the result: writes and reads the status table."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any, Final, Literal, get_args

from sqlalchemy import Select, Table

from taskiq_sa_pg.batching import Batcher, Entry
from taskiq_sa_pg.database import Database, Parameters
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.results.reader import Lookup
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.statements import (
    StatusRow,
    StoredStatus,
    Upsert,
    delete_statuses,
    select_running,
    select_statuses,
    upsert_status,
)
from taskiq_sa_pg.telemetry import Telemetry
from taskiq_sa_pg.window import Window

Unfinished = Literal["queued", "started", "retrying"]
State = Literal["unknown", Unfinished, "lost", "succeeded", "failed", "expired"]

# What can be written; "unknown" deletes.
_WRITTEN: Final = (*get_args(Unfinished), "unknown")


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """The status of a task.

    Attributes:
        task_id: The task.
        state: "queued" since queued_at; "started" at started_at by worker; "lost": started by a
            worker that has sent no heartbeat for a minute; "retrying": sent again after a failure,
            or about to be; "succeeded" or "failed" at finished_at; "expired": its result has
            expired; "unknown": nothing is stored for it.
        task_name: Its name.
        attempt: 0 for the first attempt; each of taskiq's retries adds one.
        queued_at: When this attempt was sent, by the sender's clock.
        started_at: When it was last started, by the worker's clock.
        finished_at: When its result was stored, by the database's clock.
        worker: The worker that executed it last.
    """

    task_id: str
    state: State
    task_name: str | None = None
    attempt: int = 0
    queued_at: datetime | None = None
    started_at: datetime | None = None
    worker: str | None = None
    finished_at: datetime | None = None


class Statuses:
    """Writes and reads the status table in batches; for one event loop."""

    def __init__(self, settings: Settings, database: Database, telemetry: Telemetry) -> None:
        self._database = database
        self._models = settings.models
        self._retry_timeout = settings.timings.status_retry
        self.by_values = False  # whether statements pass rows as VALUES
        self._table = settings.table
        config = settings.models.config
        self._status_name = config.qualified(config.status_table_name)
        self._written: Batcher[Any, StatusRow, StatusRow, None] = Batcher(
            self._write,
            encode=lambda _, row: row,
            rank=lambda row: row.attempt,
            window=Window(settings.gather_window),
            meter=telemetry.meters["set_status"],
        )
        self._lookup: Lookup[StoredStatus] = Lookup(
            database,
            partial(select_statuses, settings.models),
            StoredStatus._make,
            f"read the status of tasks of table {self._table}",
            telemetry.meters["get_status"],
        )

    async def close(self) -> None:
        """Rejects further calls, and returns when earlier calls are complete."""
        await asyncio.gather(self._written.close(), self._lookup.close())

    async def write(self, column_id: Any, status: TaskStatus) -> None:
        """Stores a status; "unknown" deletes it. Keeps that of a later attempt or message.

        Raises:
            ConfigurationError: The state is one that only a result can have.
        """
        if status.state not in _WRITTEN:
            raise ConfigurationError(
                f"the state must be one of {', '.join(map(repr, _WRITTEN))}, not "
                f"{status.state!r}: only stored results have the others"
            )
        row = StatusRow(
            column_id,
            status.state,
            status.task_name,
            status.attempt,
            status.queued_at,
            status.started_at,
            status.worker,
        )
        await self._written.submit(column_id, row)

    async def read(self, column_id: Any, task_id: str) -> TaskStatus:
        """Returns a task's status with the given task_id."""
        stored = await self._lookup.one(column_id)
        return TaskStatus(task_id, "unknown") if stored is None else _status_of(task_id, stored)

    async def read_running(self, limit: int) -> list[TaskStatus]:
        """Returns the tasks that are being executed, in the order of their start."""
        if self._models.status_table is None:
            return []
        purpose = f"list the running tasks of table {self._table}"
        rows = await self._database.fetch(self._select_running, {"limit": limit}, purpose)
        return [_status_of(str(row[0]), StoredStatus._make(row)) for row in rows]

    async def _write(self, batch: Mapping[Any, Entry[StatusRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        stored = [row for row in rows if row.state != "unknown"]
        if stored:
            purpose = f"store its status in table {self._status_name}"
            for statement, parameters in self._upsert.of(stored):
                await self._fetch(statement, parameters, purpose)
        deleted = [row for row in rows if row.state == "unknown"]
        if deleted:
            arrays = {
                "task_id": [row.task_id for row in deleted],
                "attempt": [row.attempt for row in deleted],
                "queued_at": [row.queued_at for row in deleted],
            }
            purpose = f"delete its status from table {self._status_name}"
            await self._fetch(self._delete, arrays, purpose)
        return {}

    async def _fetch(self, statement: Any, parameters: Parameters, purpose: str) -> None:
        await self._database.fetch(
            statement, parameters, purpose, retry_timeout=self._retry_timeout
        )

    @property
    def _status_table(self) -> Table:
        assert self._models.status_table is not None
        return self._models.status_table

    @cached_property
    def _upsert(self) -> Upsert:
        return upsert_status(self._status_table, by_values=self.by_values)

    @cached_property
    def _delete(self) -> Select[Any]:
        return delete_statuses(self._status_table)

    @cached_property
    def _select_running(self) -> Select[Any]:
        return select_running(self._models, self._status_table)


def _status_of(task_id: str, stored: StoredStatus) -> TaskStatus:
    # Drivers return times in various zones.
    values: dict[str, Any] = {
        name: value.astimezone(UTC) if isinstance(value, datetime) else value
        for name, value in stored._asdict().items()
    }
    return TaskStatus(**values | {"task_id": task_id})
