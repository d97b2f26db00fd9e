"""Sends tasks: converts messages to rows, and stores concurrent ones in one statement."""

import random
from collections.abc import Callable, Collection, Mapping
from itertools import count
from math import isfinite
from typing import Any, Final

from taskiq import BrokerMessage

from taskiq_sa_pg.batching import Batcher, Entry
from taskiq_sa_pg.broker.settings import QueueSettings, check_queue_name
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.statements import MAX_PRIORITY, QueueRow, enqueue_tasks

# Claim numbers start at a random value, so that an old claim does not match a task id that is used
# again; 30 bits leave room to count up.
_CLAIM_BITS: Final = 30

# A century. PostgreSQL's times overflow with some thousands of them.
_LONGEST_DELAY: Final = 3_155_760_000.0


class Sender:
    """Stores tasks in the queue and notifies workers after the commit, for one event loop.

    Args:
        settings: The broker's settings.
        database: The queue's database.
        announce: Called with the names of the queues that have new tasks.
    """

    def __init__(
        self,
        settings: QueueSettings,
        database: Database,
        announce: Callable[[Collection[str]], None],
    ) -> None:
        self._database = database
        self._announce = announce
        self._enqueue = enqueue_tasks(settings.queue_table)
        self._purpose = f"send it to table {settings.table}"
        self._numbers = count()
        self._batcher: Batcher[Any, tuple[int, QueueRow], QueueRow, None] = Batcher(
            self._store,
            encode=lambda _, item: item[1],
            size=lambda row: len(row.message),
            rank=lambda item: -item[0],  # the first: a waiting task is not replaced
        )

    async def send(self, row: QueueRow) -> None:
        """Stores a task; it is committed on return."""
        await self._batcher.submit(row.task_id, (next(self._numbers), row))

    async def close(self) -> None:
        """Refuses new tasks, and returns when earlier ones are stored."""
        await self._batcher.close()

    async def _store(self, batch: Mapping[Any, Entry[QueueRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        _ = await self._database.fetch_all(self._enqueue.of(rows), self._purpose)
        self._announce({row.queue_name for row in rows})
        return {}


def row_of(settings: QueueSettings, message: BrokerMessage) -> QueueRow:
    """Converts a message to a row, with its labels `queue_name`, `priority` and `delay`.

    Raises:
        ConfigurationError: A label is invalid.
        InvalidTaskIdError: The task-id column cannot hold the id.
    """
    labels = message.labels
    return QueueRow(
        task_id=settings.models.config.to_column_task_id(message.task_id),
        queue_name=_queue_name_of(labels.get("queue_name"), settings.queue_name),
        priority=int(_number_of(labels, "priority", MAX_PRIORITY, is_whole=True)),
        available_at=_number_of(labels, "delay", _LONGEST_DELAY),
        claim=random.getrandbits(_CLAIM_BITS),
        task_name=message.task_name,
        message=message.message,
    )


def _queue_name_of(label: Any, default: str) -> str:
    if label is None:
        return default
    check_queue_name("the label queue_name", label)
    return str(label)


def _number_of(
    labels: Mapping[str, Any], name: str, most: float, *, is_whole: bool = False
) -> float:
    # Labels are sent as strings, and a retry middleware sends those that it received.
    label = labels.get(name)
    if label is None:
        return 0.0
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = -1.0
    if not isfinite(number) or not 0 <= number <= most or (is_whole and number % 1):
        kind = "whole number from" if is_whole else "number of seconds from"
        raise ConfigurationError(
            f"the label {name} must be a {kind} 0 to {most:,.0f}, not {label!r}"
        )
    return number
