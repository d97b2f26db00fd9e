"""TaskMetadataMiddleware: what taskiq knows of a task goes into the row of its result."""

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from pydantic_core import to_jsonable_python
from taskiq import TaskiqMessage, TaskiqMiddleware, TaskiqResult
from taskiq.abc.broker import AsyncBroker
from taskiq.exceptions import NoResultError
from taskiq.utils import maybe_awaitable

from taskiq_sa_pg import codec
from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.broker import SQLAlchemyBroker, is_for_tick
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    NotStartedError,
    TaskiqSaPgError,
    check_flag,
    check_whole,
)
from taskiq_sa_pg.models import flaw_of_key, shortened
from taskiq_sa_pg.results import REDACTED_LABEL, State, TaskStatus, WorkerProcess

logger = logging.getLogger(__name__)

# On its way from the sender to the worker; no result has it.
QUEUED_AT_LABEL: Final = "taskiq_sa_pg_queued_at"

# What Context.requeue() counts in.
_REQUEUE_LABEL: Final = "X-Taskiq-requeue"

_EXECUTION: Final = "_taskiq_sa_pg_execution"

_Backend = SQLAlchemyResultBackend[Any]

_Redacted = tuple[list[Any] | None, dict[str, Any] | None]
RedactFunction = Callable[[str, list[Any], dict[str, Any]], _Redacted | Awaitable[_Redacted]]


class TaskMetadataMiddleware(TaskiqMiddleware):
    """Fills columns of the results table: task_name, args, kwargs, worker, queued_at, started_at.

    They go into the row that set_result() writes anyway. Where the backend tracks tasks, it also
    tells it what they are at before they have a result. Add it to the broker of a
    SQLAlchemyResultBackend, where tasks are sent and where they are executed; with another result
    backend it does nothing. Whatever fails is logged and left out, and the result is stored.

    Args:
        record_args: Whether to record the task's arguments, as JSON.
        redact: With record_args: called with task name, args and kwargs before the task starts;
            returns the args and kwargs to record, of which either may be None, which records
            none. It gets copies in their JSON-able form, which it may change. It may be
            async, and should be quick. If it raises, no arguments are recorded.
        record_worker: Whether to record who executed the task.
        worker: Who that is; None is `host:pid`.
        max_args_bytes: The most bytes of args and kwargs as JSON; larger ones are not recorded.
        abandon_lost: Whether an error result (TaskAbandonedError) is stored for a task that was
            lost with its worker and has no result, so that those who wait for it get an answer. It
            is for brokers that do not deliver such a task again; a result that comes later
            replaces it.

    Raises:
        ConfigurationError: An argument that cannot work, or two that contradict each other.
    """

    def __init__(
        self,
        *,
        record_args: bool = False,
        redact: RedactFunction | None = None,
        record_worker: bool = True,
        worker: str | None = None,
        max_args_bytes: int = 65_536,
        abandon_lost: bool = False,
    ) -> None:
        super().__init__()
        check_flag("record_args", record_args)
        check_flag("record_worker", record_worker)
        if redact is not None and not record_args:
            raise ConfigurationError("redact is for record_args=True; else leave it out")
        if redact is not None and not callable(redact):
            raise ConfigurationError(f"redact must be a callable, not {redact!r}")
        if worker is not None and not record_worker:
            raise ConfigurationError("worker is for record_worker=True; else leave it out")
        if not isinstance(worker, str | None):
            raise ConfigurationError(f"worker must be a str or None, not {worker!r}")
        check_whole("max_args_bytes", max_args_bytes)
        check_flag("abandon_lost", abandon_lost)
        if abandon_lost and not record_worker:
            raise ConfigurationError("abandon_lost is for record_worker=True; else leave it out")
        self._record_args: Final = record_args
        self._redact: Final = redact
        self._record_worker: Final = record_worker
        self._worker: Final = None if worker is None else _checked_worker(worker)
        self._host: Final = socket.gethostname()
        self._max_args_bytes: Final = max_args_bytes
        self._abandon_lost: Final = abandon_lost
        self._process: Final = WorkerProcess(
            self._worker_name, is_own_name=worker is None, abandons_lost=abandon_lost
        )
        self._has_warned = False

    def set_broker(self, broker: AsyncBroker) -> None:
        """Called by the broker that it is added to.

        Raises:
            ConfigurationError: It has been added to another one, or abandon_lost is for others.
        """
        if self._abandon_lost and isinstance(broker, SQLAlchemyBroker):
            raise ConfigurationError(
                "abandon_lost is for brokers that do not deliver a lost task again, and a "
                "SQLAlchemyBroker does: leave it out"
            )
        if self.broker not in {None, broker}:
            raise ConfigurationError(
                "this TaskMetadataMiddleware belongs to another broker: make one for each"
            )
        super().set_broker(broker)

    def startup(self) -> None:
        """Has a worker process say that it is alive, as soon as the backend is started.

        Raises:
            ConfigurationError: abandon_lost, and the backend does not see which tasks are lost.
        """
        backend = self._backend()
        if backend is None:
            return
        if self._abandon_lost and not _sees_workers(backend):
            raise ConfigurationError(
                'abandon_lost needs a result backend with track="started" and, where it has models '
                "of your own, one of WorkerMixin"
            )
        if self._record_worker and self.broker.is_worker_process:
            backend.expect_worker(self._process)

    async def shutdown(self) -> None:
        """Ends that, and deletes the row of the process; in two seconds at most."""
        backend = self._backend()
        if backend is not None:
            await backend.end_worker(self._process)

    async def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        """Notes when the task is queued, by the sender's clock."""
        if is_for_tick(message):  # of several schedulers, one sends it, by a statement of its own
            return self.pre_send_in_session(message)
        backend = self._backend()
        if backend is not None:
            try:
                queued_at, attempt = datetime.now(UTC), codec.attempt_of(message.labels)
                message.labels[QUEUED_AT_LABEL] = queued_at.isoformat()
                task_name = codec.storable_text(message.task_name)
                state = _state_when_sent(attempt)
                status = TaskStatus(message.task_id, state, task_name, attempt, queued_at)
                await _note(backend, status)
            except Exception:
                logger.exception("task %s: its metadata are not recorded", message.task_id)
        return message

    def pre_send_in_session(self, message: TaskiqMessage) -> TaskiqMessage:
        """The same of a task that is sent in a transaction, and of which nothing is told yet."""
        if self._backend() is not None:
            message.labels[QUEUED_AT_LABEL] = datetime.now(UTC).isoformat()
        return message

    async def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Notes what is known before the task starts, which may change its arguments."""
        backend = self._backend()
        if backend is not None:
            try:
                await self._note_start(backend, message)
            except Exception:
                logger.exception("task %s: its metadata are not recorded", message.task_id)
        return message

    def on_error(
        self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException
    ) -> None:
        """Notes that the task has raised, which other middlewares may take away from its result."""
        execution: _Execution | None = vars(message).get(_EXECUTION)
        if execution is not None and not isinstance(exception, NoResultError):
            execution.has_failed = True

    async def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Hands over to set_result() what was noted."""
        backend = self._backend()
        if backend is None:
            return
        try:
            metadata = codec.task_metadata_of(message)
            if metadata is codec.NO_TASK_METADATA:  # another middleware has made a new message
                metadata = codec.TaskMetadata(codec.storable_text(message.task_name))
            codec.attach(result, metadata)
            result.labels.pop(QUEUED_AT_LABEL, None)
            execution: _Execution | None = vars(message).get(_EXECUTION)
            if execution is not None and execution.is_redacted:
                result.labels[REDACTED_LABEL] = True
            await _note_end(backend, message, result)
        except Exception:
            logger.exception("task %s: its metadata are not recorded", message.task_id)

    async def _note_start(self, backend: _Backend, message: TaskiqMessage) -> None:
        queued_at, started_at = _queued_at(message), datetime.now(UTC)
        name, attempt = codec.storable_text(message.task_name), codec.attempt_of(message.labels)
        worker = self._worker_name() if self._record_worker else None
        if self._record_worker and backend.track is not None:
            with suppress(NotStartedError):
                backend.runtime.workers.begin(self._process)
        args, kwargs, is_redacted = None, None, False
        if self._record_args:
            args, kwargs, is_redacted = await self._arguments_of(message)
        metadata = codec.TaskMetadata(name, args, kwargs, worker, queued_at, started_at)
        codec.attach(message, metadata)
        status = TaskStatus(
            message.task_id, "started", name, attempt, queued_at, started_at, worker
        )
        requeues = message.labels.get(_REQUEUE_LABEL)
        vars(message)[_EXECUTION] = _Execution(status, requeues, is_redacted)
        await _note(backend, status)

    async def _arguments_of(self, message: TaskiqMessage) -> tuple[str | None, str | None, bool]:
        """Arguments as JSON text, None if they are not recorded, and whether they are redacted."""
        name = f"{message.task_name} {message.task_id}"
        try:
            args, kwargs = _to_jsonable([message.args, message.kwargs])
        except Exception as exc:  # noqa: BLE001 - types of the application's
            logger.error("task %s: its arguments are no JSON: %r", name, exc)  # noqa: TRY400 - the reason says it all
            return None, None, False
        try:
            is_redacted = False
            if self._redact is not None:
                before = _canonical([args, kwargs])  # now, because it may change what it gets
                redacted = await maybe_awaitable(self._redact(message.task_name, args, kwargs))
                args, kwargs = _to_jsonable(_checked(redacted))
                is_redacted = _canonical([args, kwargs]) != before
            texts = _to_json(args), _to_json(kwargs)
        except Exception as exc:  # noqa: BLE001 - the application's function
            # Neither its text nor a traceback: they may hold what was to be redacted.
            reason = codec.qualified_name(type(exc))
            logger.error("task %s: its arguments are not recorded: %s", name, reason)  # noqa: TRY400 - as above
            return None, None, False
        size = sum(len(text.encode()) for text in texts if text is not None)
        if size > self._max_args_bytes:
            logger.warning(
                "task %s: its arguments are not recorded: they have %d bytes, more than "
                "max_args_bytes=%d",
                *(name, size, self._max_args_bytes),
            )
            return None, None, False
        return *texts, is_redacted

    def _worker_name(self) -> str:
        return self._worker or f"{self._host}:{os.getpid()}"

    def _backend(self) -> _Backend | None:
        backend = self.broker.result_backend
        if isinstance(backend, SQLAlchemyResultBackend):
            with suppress(NotStartedError):  # on this event loop
                backend.runtime.writer.awaits_middleware = False
            return backend
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "TaskMetadataMiddleware does nothing: the broker's result backend is a %s and not "
                "a SQLAlchemyResultBackend",
                type(backend).__qualname__,
            )
        return None


@dataclass(slots=True)
class _Execution:
    """One execution of a message, which bears it as it bears its TaskMetadata."""

    status: TaskStatus
    requeues: Any
    is_redacted: bool
    has_failed: bool = False


async def _note_end(backend: _Backend, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
    """Notes what comes instead of a result."""
    execution: _Execution | None = vars(message).get(_EXECUTION)
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


async def _note(backend: _Backend, status: TaskStatus) -> None:
    """Stores a status; a task matters more than its status, and waits for seconds at most."""
    if backend.track is None:
        return
    timeout = backend.settings.timings.status_retry
    try:
        async with asyncio.timeout(timeout):
            await backend.set_status(status)
    except (TimeoutError, TaskiqSaPgError) as exc:
        complaint = "task %s: that it is %s is not recorded: %s"
        reason = str(exc) or f"PostgreSQL did not answer within {timeout:g} s"
        logger.warning(complaint, status.task_id, status.state, reason)


def _sees_workers(backend: _Backend) -> bool:
    return backend.track is not None and backend.models.Worker is not None


def _checked_worker(worker: str) -> str:
    name = codec.storable_text(worker)
    flaw = flaw_of_key(name) if name else "is empty"
    if flaw:
        raise ConfigurationError(f"worker {flaw}: {shortened(name)!r}")
    return name


def _state_when_sent(attempt: int) -> State:
    return "retrying" if attempt else "queued"


def _queued_at(message: TaskiqMessage) -> datetime | None:
    try:
        return datetime.fromisoformat(message.labels[QUEUED_AT_LABEL]).astimezone(UTC)
    except KeyError:  # the sender has no such middleware
        return None
    except Exception:  # noqa: BLE001 - a label can be anything
        logger.warning("task %s: its label %s is no time", message.task_id, QUEUED_AT_LABEL)
        return None


def _to_jsonable(value: Any) -> Any:
    return to_jsonable_python(value, inf_nan_mode="strings")


def _checked(redacted: object) -> _Redacted:
    match redacted:
        case tuple((list() | tuple() | None, Mapping() | None)):
            return redacted
    raise TypeError("redact must return a tuple: a list or None, and a dict or None")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _to_json(values: list[Any] | dict[str, Any] | None) -> str | None:
    if values is None:
        return None
    storable = (
        {codec.storable_text(name): _storable(value) for name, value in values.items()}
        if isinstance(values, dict)
        else list(map(_storable, values))
    )
    return json.dumps(storable, ensure_ascii=False)


def _storable(value: Any) -> Any:
    """The value, or the wrapper of one that jsonb would refuse or change."""
    return value if codec.is_plain(value) else codec.wrap(json.dumps(value).encode())
