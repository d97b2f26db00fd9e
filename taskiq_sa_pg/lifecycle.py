"""What taskiq's hooks know of a task before its result, for the status table.

Nothing here raises, and a task waits for it for seconds at most: it matters more than its status.
"""

import asyncio
import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from taskiq import TaskiqMessage, TaskiqResult
from taskiq.exceptions import NoResultError

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.codec import attempt_of
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.jsonb import storable_text
from taskiq_sa_pg.metadata import Metadata
from taskiq_sa_pg.tracking import RETRY_TIMEOUT, State, TaskStatus

logger = logging.getLogger(__name__)

_Backend = SQLAlchemyResultBackend[Any]

# What Context.requeue() counts in.
_REQUEUE_LABEL: Final = "X-Taskiq-requeue"

_ATTRIBUTE: Final = "_taskiq_sa_pg_execution"


@dataclass(slots=True)
class _Execution:
    """One execution of a message, which bears it as it bears its Metadata."""

    status: TaskStatus
    requeues: Any
    has_failed: bool = False


async def note_sent(backend: _Backend, message: TaskiqMessage, queued_at: datetime) -> None:
    """Called before a message is sent."""
    if backend.track is not None:
        state = _state_when_sent(attempt_of(message.labels))
        await _note(backend, _status(message, state, queued_at))


async def note_started(backend: _Backend, message: TaskiqMessage, metadata: Metadata) -> None:
    """Called before a message is executed."""
    if backend.track is None:
        return
    times = _time(metadata.queued_at), _time(metadata.started_at)
    status = _status(message, "started", *times, metadata.worker)
    vars(message)[_ATTRIBUTE] = _Execution(status, message.labels.get(_REQUEUE_LABEL))
    await _note(backend, status)


def note_failure(message: TaskiqMessage, exception: BaseException) -> None:
    """Called when a task has raised."""
    execution = _execution_of(message)
    if execution is not None and not isinstance(exception, NoResultError):
        execution.has_failed = True


async def note_end(backend: _Backend, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
    """Called when a message was executed: without a result, it says what comes instead."""
    execution = _execution_of(message)
    if execution is None or not isinstance(result.error, NoResultError):
        return
    state: State
    if message.labels.get(_REQUEUE_LABEL) != execution.requeues:
        state = _state_when_sent(execution.status.attempt)
    elif execution.has_failed:  # another middleware has taken the error away, to try again
        state = "retrying"
    else:
        state = "unknown"
    # Of the message that was executed: a retry middleware has changed its labels since.
    await _note(backend, replace(execution.status, state=state))


def _state_when_sent(attempt: int) -> State:
    return "retrying" if attempt else "queued"


def _status(
    message: TaskiqMessage,
    state: State,
    queued_at: datetime | None,
    started_at: datetime | None = None,
    worker: str | None = None,
) -> TaskStatus:
    return TaskStatus(
        message.task_id,
        state,
        storable_text(message.task_name),
        attempt_of(message.labels),
        queued_at,
        started_at,
        worker,
    )


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _execution_of(message: TaskiqMessage) -> _Execution | None:
    execution: _Execution | None = vars(message).get(_ATTRIBUTE)
    return execution


async def _note(backend: _Backend, status: TaskStatus) -> None:
    complaint = "task %s: that it is %s is not recorded: %s"
    try:
        async with asyncio.timeout(RETRY_TIMEOUT):
            await backend.set_status(status)
    except TimeoutError:
        reason = f"PostgreSQL did not answer within {RETRY_TIMEOUT:g} s"
        logger.warning(complaint, status.task_id, status.state, reason)
    except TaskiqSaPgError as exc:
        logger.warning(complaint, status.task_id, status.state, exc)
