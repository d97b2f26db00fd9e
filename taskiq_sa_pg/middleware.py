"""TaskMetadataMiddleware: stores what taskiq knows about a task in the row of its result."""

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

# Carried from the sender to the worker; removed before the result is stored.
QUEUED_AT_LABEL: Final = "taskiq_sa_pg_queued_at"

# Context.requeue() counts in this label.
_REQUEUE_LABEL: Final = "X-Taskiq-requeue"

_EXECUTION: Final = "_taskiq_sa_pg_execution"

_Backend = SQLAlchemyResultBackend[Any]

_Redacted = tuple[list[Any] | None, dict[str, Any] | None]
RedactFunction = Callable[[str, list[Any], dict[str, Any]], _Redacted | Awaitable[_Redacted]]


class TaskMetadataMiddleware(TaskiqMiddleware):
    """Fills columns of the results table: task_name, args, kwargs, worker, queued_at, started_at.

    They are stored in the row that set_result() writes anyway. If the backend tracks tasks, the
    middleware also stores the status of unfinished tasks. Add it to the broker of a
    SQLAlchemyResultBackend, both where tasks are sent and where they are executed. With another
    result backend it does nothing. If recording fails, the error is logged and the result is
    stored without that value.

    Args:
        record_args: Whether to record the task's arguments, as JSON.
        redact: Called with task name, args and kwargs before the task starts; needs record_args.
            Returns the args and kwargs to record; either may be None, which records none. It
            receives copies in their JSON-able form, which it may change. It may be async, and
            should be fast. If it raises, no arguments are recorded.
        record_worker: Whether to record the name of the worker that executed the task.
        worker: The worker's name. None is `host:pid`.
        max_args_bytes: Maximum size in bytes of args and kwargs as JSON. Larger arguments are not
            recorded.
        abandon_lost: Whether to store an error result (TaskAbandonedError) for a task that was
            lost with its worker and has no result, so that waiting clients get an answer. Use it
            with brokers that do not redeliver such a task. A later result replaces the error.

    Raises:
        ConfigurationError: An argument is invalid, or two arguments contradict each other.
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
            raise ConfigurationError("redact needs record_args=True")
        if redact is not None and not callable(redact):
            raise ConfigurationError(f"redact must be a callable, not {redact!r}")
        if worker is not None and not record_worker:
            raise ConfigurationError("worker needs record_worker=True")
        if not isinstance(worker, str | None):
            raise ConfigurationError(f"worker must be a str or None, not {worker!r}")
        check_whole("max_args_bytes", max_args_bytes)
        check_flag("abandon_lost", abandon_lost)
        if abandon_lost and not record_worker:
            raise ConfigurationError("abandon_lost needs record_worker=True")
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
        """Called by the broker when the middleware is added to it.

        Raises:
            ConfigurationError: It was added to another broker before, or abandon_lost is set with
                a SQLAlchemyBroker.
        """
        if self._abandon_lost and isinstance(broker, SQLAlchemyBroker):
            raise ConfigurationError(
                "abandon_lost is for brokers that do not redeliver lost tasks; SQLAlchemyBroker "
                "does: omit abandon_lost"
            )
        if self.broker not in {None, broker}:
            raise ConfigurationError(
                "this TaskMetadataMiddleware belongs to another broker: create one for each broker"
            )
        super().set_broker(broker)

    def startup(self) -> None:
        """Makes a worker process send heartbeats as soon as the backend is started.

        Raises:
            ConfigurationError: abandon_lost is set, and the backend cannot detect lost tasks.
        """
        backend = self._backend()
        if backend is None:
            return
        if self._abandon_lost and not _sees_workers(backend):
            raise ConfigurationError(
                'abandon_lost needs a result backend with track="started" and, if you pass your '
                "own models, a model with WorkerMixin"
            )
        if self._record_worker and self.broker.is_worker_process:
            backend.expect_worker(self._process)

    async def shutdown(self) -> None:
        """Ends the heartbeats and deletes the row of the process, within two seconds."""
        backend = self._backend()
        if backend is not None:
            await backend.end_worker(self._process)

    async def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        """Records when the task is queued, by the sender's clock."""
        if is_for_tick(message):  # only one of several schedulers sends it, in its own statement
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
                logger.exception("task %s: its metadata is not recorded", message.task_id)
        return message

    def pre_send_in_session(self, message: TaskiqMessage) -> TaskiqMessage:
        """The same for a task that is sent in a transaction; stores no status yet."""
        if self._backend() is not None:
            message.labels[QUEUED_AT_LABEL] = datetime.now(UTC).isoformat()
        return message

    async def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Records what is known before the task starts, because a task may change its arguments."""
        backend = self._backend()
        if backend is not None:
            try:
                await self._note_start(backend, message)
            except Exception:
                logger.exception("task %s: its metadata is not recorded", message.task_id)
        return message

    def on_error(
        self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException
    ) -> None:
        """Records that the task has raised; other middlewares may remove that from its result."""
        execution: _Execution | None = vars(message).get(_EXECUTION)
        if execution is not None and not isinstance(exception, NoResultError):
            execution.has_failed = True

    async def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Passes the recorded metadata to set_result()."""
        backend = self._backend()
        if backend is None:
            return
        try:
            metadata = codec.task_metadata_of(message)
            if metadata is codec.NO_TASK_METADATA:  # another middleware replaced the message
                metadata = codec.TaskMetadata(codec.storable_text(message.task_name))
            codec.attach(result, metadata)
            result.labels.pop(QUEUED_AT_LABEL, None)
            execution: _Execution | None = vars(message).get(_EXECUTION)
            if execution is not None and execution.is_redacted:
                result.labels[REDACTED_LABEL] = True
            await _note_end(backend, message, result)
        except Exception:
            logger.exception("task %s: its metadata is not recorded", message.task_id)

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
        """Args and kwargs as JSON text, None if not recorded; and whether they are redacted."""
        name = f"{message.task_name} {message.task_id}"
        try:
            args, kwargs = _to_jsonable([message.args, message.kwargs])
        except Exception as exc:  # noqa: BLE001 - the types are the application's
            logger.error("task %s: its arguments cannot be converted to JSON: %r", name, exc)  # noqa: TRY400 - the reason is enough
            return None, None, False
        try:
            is_redacted = False
            if self._redact is not None:
                before = _canonical([args, kwargs])  # now, because redact may change them in place
                redacted = await maybe_awaitable(self._redact(message.task_name, args, kwargs))
                args, kwargs = _to_jsonable(_checked(redacted))
                is_redacted = _canonical([args, kwargs]) != before
            texts = _to_json(args), _to_json(kwargs)
        except Exception as exc:  # noqa: BLE001 - the application's function
            # No text and no traceback: they may contain the values to redact.
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
    """One execution of a message, attached to the message like its TaskMetadata."""

    status: TaskStatus
    requeues: Any
    is_redacted: bool
    has_failed: bool = False


async def _note_end(backend: _Backend, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
    """Stores the status of an execution that ends without a result."""
    execution: _Execution | None = vars(message).get(_EXECUTION)
    if execution is None or not isinstance(result.error, NoResultError):
        return
    state: State
    if message.labels.get(_REQUEUE_LABEL) != execution.requeues:
        state = _state_when_sent(execution.status.attempt)
    elif execution.has_failed:  # another middleware removed the error, to retry the task
        state = "retrying"
    else:
        state = "unknown"
    # From the executed message: a retry middleware has changed its labels since.
    await _note(backend, replace(execution.status, state=state))


async def _note(backend: _Backend, status: TaskStatus) -> None:
    """Stores a status. The task is more important than its status, so the time is limited."""
    if backend.track is None:
        return
    timeout = backend.settings.timings.status_retry
    try:
        async with asyncio.timeout(timeout):
            await backend.set_status(status)
    except (TimeoutError, TaskiqSaPgError) as exc:
        complaint = "task %s: status %s is not recorded: %s"
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
        logger.warning("task %s: its label %s is not a time", message.task_id, QUEUED_AT_LABEL)
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
    """The value, or a wrapper for a value that jsonb would reject or change."""
    return value if codec.is_plain(value) else codec.wrap(json.dumps(value).encode())
