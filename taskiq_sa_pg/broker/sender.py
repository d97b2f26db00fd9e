"""Sending tasks: a message becomes a row, and what is sent at once shares a statement."""

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

# The number begins anywhere, so that a claim of a task id that was used before holds nothing of its
# later use; and leaves room to grow.
_CLAIM_BITS: Final = 30

# A century. PostgreSQL's times would overflow with some thousands of them.
_LONGEST_DELAY: Final = 3_155_760_000.0


class Sender:
    """Stores tasks in the queue, and tells workers of what was committed.

    Made for one event loop.

    Args:
        settings: Those of the broker.
        database: Where the queue is.
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
        self._purpose = f"send it through table {settings.table}"
        self._numbers = count()
        self._batcher: Batcher[Any, tuple[int, QueueRow], QueueRow, None] = Batcher(
            self._store,
            encode=lambda _, item: item[1],
            size=lambda row: len(row.message),
            rank=lambda item: -item[0],  # a task that waits already stays as it is
        )

    async def send(self, row: QueueRow) -> None:
        """Stores a task; it is committed on return."""
        await self._batcher.submit(row.task_id, (next(self._numbers), row))

    async def close(self) -> None:
        """Refuses further tasks, and returns when those before are stored."""
        await self._batcher.close()

    async def _store(self, batch: Mapping[Any, Entry[QueueRow]]) -> Mapping[Any, None]:
        rows = [entry.row for entry in batch.values()]
        _ = await self._database.fetch_all(self._enqueue.of(rows), self._purpose)
        self._announce({row.queue_name for row in rows})
        return {}


def row_of(settings: QueueSettings, message: BrokerMessage) -> QueueRow:
    """What is stored of a message, as its labels `queue_name`, `priority` and `delay` say.

    Raises:
        ConfigurationError: A label that cannot work.
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
    # Labels travel as strings, and a retry middleware sends those that it got.
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
