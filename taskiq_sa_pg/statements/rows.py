"""Rows between the codec and the tables, as they are written and read."""

from datetime import datetime, timedelta
from typing import Any, NamedTuple


class ResultRow(NamedTuple):
    """The row that set_result() writes, in the order of the columns; JSON columns as text."""

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
    expires_at: float | None  # seconds from now, by the database's clock
    args: str | None = None
    kwargs: str | None = None
    worker: str | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None


class ProgressRow(NamedTuple):
    """The row that set_progress() writes; meta as ResultRow's return_value."""

    task_id: Any
    state: str
    meta: bytes | str | None


class StatusRow(NamedTuple):
    """The row that set_status() writes."""

    task_id: Any
    state: str
    task_name: str | None
    attempt: int
    queued_at: datetime | None
    started_at: datetime | None
    worker: str | None


class StoredResult(NamedTuple):
    """A result, in the order of select_results() and take_results()."""

    task_id: Any
    is_err: bool
    return_value: bytes | str
    error: bytes | str | None
    error_type: str | None
    execution_time: float
    labels: str
    log: str | None


class StoredProgress(NamedTuple):
    """Progress, in the order of select_progress()."""

    task_id: Any
    state: str
    meta: bytes | str | None


class StoredStatus(NamedTuple):
    """A status, in the order of select_statuses() and select_running()."""

    task_id: Any
    state: str
    task_name: str | None
    attempt: int
    queued_at: datetime | None
    started_at: datetime | None
    worker: str | None
    finished_at: datetime | None


class StoredWorker(NamedTuple):
    """A worker process, in the order of select_workers()."""

    worker: str
    started_at: datetime
    seen_at: datetime
    is_alive: bool
    running: int  # number of tasks that it has started and that have no result


class StoredMessage(NamedTuple):
    """The recorded parts of a message, in the order of select_messages(); JSON as text."""

    task_name: str | None
    args: str | None
    kwargs: str | None
    labels: str


class StoredRecord(NamedTuple):
    """A finished task, in the order of select_records()."""

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
    """Further details of a finished task, after a StoredRecord in select_details()."""

    traceback: str | None
    args: str | None  # JSON as text
    kwargs: str | None


class Counts(NamedTuple):
    """Counts of the results table, in the order of select_counts(); only `expired` counts those."""

    results: int
    failures: int
    expired: int
    oldest: datetime | None
    newest: datetime | None


class QueueRow(NamedTuple):
    """The row that sending a task writes."""

    task_id: Any
    queue_name: str
    priority: int
    available_at: float  # seconds from now, by the database's clock
    claim: int
    task_name: str
    message: bytes


class Claimed(NamedTuple):
    """A task that a worker has claimed, in the order of claim_tasks()."""

    task_id: Any
    claim: int
    deliveries: int  # including this one
    priority: int
    task_name: str
    message: bytes
    queued_at: datetime


class ScheduleRow(NamedTuple):
    """A schedule as it is written and read."""

    schedule_id: str
    task_name: str
    cron: str | None
    interval: timedelta | None
    time: datetime | None
    message: bytes
    is_labelled: bool


class ListedSchedule(NamedTuple):
    """A schedule with its last tick, in the order of list_schedules()."""

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
    """The outcome of sending the task of a schedule."""

    is_sent: bool
    seconds: float | None  # until an interval is due again


class OldTask(NamedTuple):
    """A task that is imported from another queue: a QueueRow and the time when it was sent."""

    task_id: Any
    queue_name: str
    priority: int
    available_at: float
    claim: int
    task_name: str
    message: bytes
    queued_at: datetime


class Tally(NamedTuple):
    """The tasks of one queue, priority, state and task name, in the order of count_tasks().

    The state is "waiting" (due), "later" (delayed, or claimed by a worker) or "parked" (never due).
    """

    queue_name: str
    priority: int
    state: str
    task_name: str
    tasks: int
    taken: int  # number of them that a worker has or had claimed
    oldest: float | None  # seconds since the oldest waiting one is due


class ParkedRow(NamedTuple):
    """A task that was delivered too often, in the order of select_parked()."""

    task_id: Any
    task_name: str
    queue_name: str
    deliveries: int
    worker: str | None  # that parked it
    queued_at: datetime
