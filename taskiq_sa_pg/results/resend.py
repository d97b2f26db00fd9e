"""Sends a task again, with the message data in the row of its result."""

import json
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Select
from taskiq import AsyncBroker, AsyncTaskiqTask
from taskiq.kicker import AsyncKicker

from taskiq_sa_pg.codec import is_wrapper, unwrap
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError, NotResendableError, ResultIsMissingError
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.statements import StoredMessage, select_messages

# Set on a result if its recorded arguments differ from those of the task.
REDACTED_LABEL: Final = "taskiq_sa_pg_redacted"

# Set on a task that was sent again: the id of the original task.
RERUN_LABEL: Final = "rerun_of"

_DELAY_LABEL: Final = "delay"

# Labels of one message, not of the task: set by taskiq's retries, requeues, schedules and tracing,
# and by SQLAlchemyBroker's delays.
_OF_A_MESSAGE: Final = frozenset(
    {
        "_retries",
        "_taskiq_broker_receive_time",
        "_taskiq_queue_time",
        "X-Taskiq-requeue",
        "baggage",
        _DELAY_LABEL,
        "schedule_id",
        "traceparent",
        "tracestate",
    }
)
_OURS: Final = "taskiq_sa_pg_"


class Resender:
    """Sends tasks again."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._codec = settings.codec
        self._models = settings.models
        self._table = settings.table

    async def resend(
        self, broker: AsyncBroker, column_id: Any, task_id: str
    ) -> AsyncTaskiqTask[Any]:
        """Sends a task again, under a new id.

        Raises:
            ResultIsMissingError: The task has no result, or no longer has one.
            ResultDecodeError: Its labels cannot be decoded.
            NotResendableError: Its arguments or its name were not recorded, or were redacted.
            SendTaskError: The broker could not send it.
            ConfigurationError: broker is not a taskiq broker.
        """
        if not isinstance(broker, AsyncBroker):
            raise ConfigurationError(f"broker must be a taskiq broker, not {broker!r}")
        purpose = f"read the recorded data of task {task_id!r} in table {self._table}"
        rows = await self._database.fetch(self._select, {"task_ids": [column_id]}, purpose)
        if not rows:
            raise ResultIsMissingError(task_id, self._table)
        stored = StoredMessage._make(rows[0])
        labels = self._codec.decode_labels(task_id, stored.labels)
        if stored.task_name is None or stored.args is None or stored.kwargs is None:
            raise NotResendableError(task_id, _why_not_recorded(stored, labels))
        if labels.get(REDACTED_LABEL):
            raise NotResendableError(task_id, _REDACTED)
        args = [_value_of(each) for each in json.loads(stored.args)]
        kwargs = {name: _value_of(each) for name, each in json.loads(stored.kwargs).items()}
        labels = {name: value for name, value in labels.items() if not _is_of_a_message(name)}
        task = broker.find_task(stored.task_name)
        if task is not None and _DELAY_LABEL in task.labels:
            # The delay that the task declares; SmartRetryMiddleware uses it, too.
            labels[_DELAY_LABEL] = task.labels[_DELAY_LABEL]
        kicker: AsyncKicker[..., Any] = AsyncKicker(
            stored.task_name,
            broker,
            labels | {RERUN_LABEL: task_id},
            return_type=getattr(task, "return_type", None),
        )
        sent: AsyncTaskiqTask[Any] = await kicker.kiq(*args, **kwargs)
        return sent

    @cached_property
    def _select(self) -> Select[Any]:
        return select_messages(self._models)


_REDACTED: Final = (
    "its arguments were redacted before they were recorded. Send it from code that has the "
    "arguments"
)


def _why_not_recorded(stored: StoredMessage, labels: dict[str, Any]) -> str:
    if labels.get(REDACTED_LABEL):
        return _REDACTED
    if stored.task_name is None:
        return (
            "its name was not recorded. Add TaskMetadataMiddleware(record_args=True) to the broker "
            "for future tasks, and send this one from your code"
        )
    return (
        "its arguments were not recorded: TaskMetadataMiddleware needs record_args=True. It does "
        "not record arguments that exceed max_args_bytes or cannot be converted to JSON; the "
        "worker logs these. Send it from code that has the arguments"
    )


def _value_of(recorded: Any) -> Any:
    """A recorded value, without the wrapper of values that jsonb cannot store."""
    return unwrap(recorded, json.loads) if is_wrapper(recorded) else recorded


def _is_of_a_message(label: str) -> bool:
    return label in _OF_A_MESSAGE or label.startswith(_OURS)
