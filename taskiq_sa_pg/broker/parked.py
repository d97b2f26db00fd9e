"""What people do with parked tasks, those that were delivered too often: release or discard."""

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any, Final

from sqlalchemy import Executable

from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.statements import (
    ParkedTask,
    count_parked,
    discard_parked,
    in_slices,
    release_parked,
    select_parked,
)

# A statement locks no more of them at once.
_SLICE: Final = 1000


class ParkedTasks:
    """The parked tasks of a queue, or of them those of one queue's name or task name.

    Args:
        settings: Those of the broker.
        database: Where the queue is.
        announce: Called with the names of the queues that have tasks to take.
        queue_name: Of this queue only.
        task_name: Of this task only.
    """

    def __init__(
        self,
        settings: QueueSettings,
        database: Database,
        announce: Callable[[Collection[str]], None],
        *,
        queue_name: str | None = None,
        task_name: str | None = None,
    ) -> None:
        self._queue = settings.queue_table
        self._table = settings.table
        self._database = database
        self._announce = announce
        self._filter = {"queue_name": queue_name, "task_name": task_name}

    async def count(self) -> int:
        """How many there are."""
        purpose = f"count the parked tasks of table {self._table}"
        statement = count_parked(self._queue, **self._filter)
        [[count]] = await self._database.fetch(statement, {}, purpose)
        return int(count)

    async def read(self, limit: int) -> list[ParkedTask]:
        """At most `limit` of them, in the order in which they were sent."""
        purpose = f"read the parked tasks of table {self._table}"
        statement = select_parked(self._queue, **self._filter)
        rows = await self._database.fetch(statement, {"size": limit}, purpose)
        return [ParkedTask._make(row) for row in rows]

    async def release(self, task_ids: Sequence[Any] | None = None) -> set[Any]:
        """Makes those tasks, or all, due at once, as if they had just been sent.

        Workers are told. It may be repeated where it was interrupted.

        Returns:
            The ids of the tasks that were parked.
        """
        purpose = f"release parked tasks of table {self._table}"
        released = set()
        async for rows in self._change(release_parked, task_ids, purpose):
            self._announce({queue_name for _, queue_name in rows})
            released |= {task_id for task_id, _ in rows}
        return released

    async def discard(self, task_ids: Sequence[Any] | None = None) -> set[Any]:
        """Deletes those tasks, or all; their results stay. Returns what release() returns."""
        purpose = f"discard parked tasks of table {self._table}"
        changes = self._change(discard_parked, task_ids, purpose)
        return {task_id async for rows in changes for task_id, _ in rows}

    async def _change(
        self, change: Callable[..., Executable], task_ids: Sequence[Any] | None, purpose: str
    ) -> AsyncIterator[Sequence[Any]]:
        if task_ids is not None:
            statement = change(self._queue, by_id=True)
            for some in in_slices(list(task_ids)):
                yield await self._database.fetch(statement, {"task_ids": some}, purpose)
            return
        statement = change(self._queue, **self._filter)
        while rows := await self._database.fetch(statement, {"size": _SLICE}, purpose):
            yield rows
