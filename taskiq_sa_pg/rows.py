"""What travels between the codec and the tables: rows as they are written and as they are read."""

from datetime import datetime
from typing import Any, Final, NamedTuple


class ResultRow(NamedTuple):
    """What set_result writes, in the order of the columns; JSON columns as text."""

    task_id: Any
    is_err: bool
    return_value: bytes | str
    error: bytes | str | None
    error_type: str | None
    traceback: str | None
    execution_time: float
    labels: str
    log: str | None
    task_name: str | None
    attempt: int
    expires_at: float | None  # in so many seconds, by the database's clock
    # TaskMetadataMiddleware's. A table that step 2 of the schema has not reached has none of them.
    args: str | None = None
    kwargs: str | None = None
    worker: str | None = None
    queued_at: float | None = None  # seconds since 1970
    started_at: float | None = None


class Features(NamedTuple):
    """What of the later steps of the schema the tables have."""

    has_metadata: bool = True  # METADATA_COLUMNS
    has_status: bool = True  # the status table


METADATA_COLUMNS: Final = ("args", "kwargs", "worker", "queued_at", "started_at")

# What every results table has, whatever its step.
FIRST_FIELDS: Final = ResultRow._fields[: -len(METADATA_COLUMNS)]

# All columns of the tables that are ours, but for METADATA_COLUMNS.
RESULT_COLUMNS: Final = frozenset({*FIRST_FIELDS, "finished_at"})


class ProgressRow(NamedTuple):
    """What set_progress writes; meta as ResultRow's return_value."""

    task_id: Any
    state: str
    meta: bytes | str | None


class StatusRow(NamedTuple):
    """What set_status writes."""

    task_id: Any
    state: str
    task_name: str | None
    attempt: int
    queued_at: float | None  # seconds since 1970
    started_at: float | None
    worker: str | None


class StoredResult(NamedTuple):
    """What reading a result returns, in the order of select_results() and take_results()."""

    task_id: Any
    is_err: bool
    return_value: bytes | str
    error: bytes | str | None
    error_type: str | None
    execution_time: float
    labels: str
    log: str | None


class StoredProgress(NamedTuple):
    """What reading progress returns, in the order of select_progress()."""

    task_id: Any
    state: str
    meta: bytes | str | None


class StoredStatus(NamedTuple):
    """What reading a status returns, in the order of select_statuses() and select_running()."""

    task_id: Any
    state: str
    task_name: str | None
    attempt: int
    queued_at: datetime | None
    started_at: datetime | None
    worker: str | None
    finished_at: datetime | None
