"""What travels between the codec and the tables: rows as they are written and as they are read."""

from datetime import datetime, timedelta
from typing import Any, NamedTuple


class ResultRow(NamedTuple):
    """What set_result() writes, in the order of the columns; JSON columns as text."""

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
    args: str | None = None
    kwargs: str | None = None
    worker: str | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None


class ProgressRow(NamedTuple):
    """What set_progress() writes; meta as ResultRow's return_value."""

    task_id: Any
    state: str
    meta: bytes | str | None


class StatusRow(NamedTuple):
    """What set_status() writes."""

    task_id: Any
    state: str
    task_name: str | None
    attempt: int
    queued_at: datetime | None
    started_at: datetime | None
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


class StoredWorker(NamedTuple):
    """A worker process, as select_workers() returns it."""

    worker: str
    started_at: datetime
    seen_at: datetime
    is_alive: bool
    running: int  # tasks that it has started, without a result


class StoredMessage(NamedTuple):
    """What a result's row has of its message, as select_messages() returns it; JSON as text."""

    task_name: str | None
    args: str | None
    kwargs: str | None
    labels: str


class StoredRecord(NamedTuple):
    """What finding a finished task returns, in the order of select_records()."""

    task_id: Any
    is_err: bool
    task_name: str | None
    worker: str | None
    attempt: int
    error_type: str | None
    execution_time: float
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime
    expires_at: datetime | None
    labels: str  # JSON as text


class StoredDetails(NamedTuple):
    """What select_details() returns of a finished task, beside its StoredRecord."""

    traceback: str | None
    args: str | None  # JSON as text
    kwargs: str | None


class Counts(NamedTuple):
    """The results table in figures, as select_counts() returns it; all but `expired` are live."""

    results: int
    failures: int
    expired: int
    oldest: datetime | None
    newest: datetime | None


class QueueRow(NamedTuple):
    """What sending a task writes."""

    task_id: Any
    queue_name: str
    priority: int
    available_at: float  # in so many seconds, by the database's clock
    claim: int
    task_name: str
    message: bytes


class Claimed(NamedTuple):
    """A task that claim_tasks() has given to a worker, in the order of its columns."""

    task_id: Any
    claim: int
    deliveries: int  # this one among them
    priority: int
    task_name: str
    message: bytes
    queued_at: datetime


class ScheduleRow(NamedTuple):
    """A schedule, as it is written and read."""

    schedule_id: str
    task_name: str
    cron: str | None
    interval: timedelta | None
    time: datetime | None
    message: bytes
    is_labelled: bool


class ListedSchedule(NamedTuple):
    """A schedule with what became of it, in the order of list_schedules()."""

    schedule_id: str
    task_name: str
    cron: str | None
    interval: timedelta | None
    time: datetime | None
    message: bytes
    is_labelled: bool
    last_tick: datetime | None
    created_at: datetime


class Sent(NamedTuple):
    """What sending the task of a schedule returns."""

    is_sent: bool
    seconds: float | None  # until an interval is due again


class OldTask(NamedTuple):
    """What is written of a task that comes from another queue: a QueueRow, and when it was sent."""

    task_id: Any
    queue_name: str
    priority: int
    available_at: float
    claim: int
    task_name: str
    message: bytes
    queued_at: datetime


class Tally(NamedTuple):
    """Tasks of one queue, priority, state and task name, as count_tasks() returns them.

    A task is due, and so "waiting"; or "later", because it was delayed or a worker has it; or never
    due: "parked".
    """

    queue_name: str
    priority: int
    state: str
    task_name: str
    tasks: int
    taken: int  # of them, those that a worker has, or had
    oldest: float | None  # for so many seconds one has waited


class ParkedRow(NamedTuple):
    """A task that was delivered too often, in the order of select_parked()."""

    task_id: Any
    task_name: str
    queue_name: str
    deliveries: int
    worker: str | None  # that has given it up
    queued_at: datetime
