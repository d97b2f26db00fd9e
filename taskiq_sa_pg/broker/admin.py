"""Administration of a queue: its depth, its parked tasks and its schedules."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Executable, Select

from taskiq_sa_pg.broker.schedule_info import ScheduleInfo, info_of_row
from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.statements import (
    ListedSchedule,
    ParkedRow,
    Tally,
    count_parked,
    count_tasks,
    discard_parked,
    in_slices,
    list_schedules,
    release_parked,
    select_parked,
)

# The most tasks that one statement locks.
_SLICE: Final = 1000

# The most parked tasks of a queue and priority that are sorted by time of sending.
_MOST_SORTED: Final = 10_000

# The counts, and the state of a Tally that each comes from.
_STATES: Final = {
    "waiting": "waiting",
    "delayed": "later",
    "running": "later",
    "parked": "parked",
}

# PostgreSQL's largest integer minus one.
MAX_ROWS: Final = 2**31 - 2


@dataclass(frozen=True, slots=True)
class QueueCount:
    """The tasks of one queue and task name.

    Attributes:
        queue_name: The queue.
        task_name: The task.
        waiting: Tasks that are due and not claimed. If a worker dies, its tasks are waiting again
            when their leases end.
        delayed: Tasks that are not due yet.
        running: Tasks that a worker has claimed.
        parked: Tasks that were delivered `max_deliveries` times and never acknowledged; they are
            not delivered again.
        oldest_waiting: Seconds since the oldest waiting task became due; None if none waits.
        at_least: The names of the counts that stopped at the limit, such as ("waiting",): there
            may be more tasks.
    """

    queue_name: str
    task_name: str
    waiting: int
    delayed: int
    running: int
    parked: int
    oldest_waiting: float | None
    at_least: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ParkedTask:
    """A task that was delivered `max_deliveries` times and never acknowledged.

    Attributes:
        task_id: The task id.
        task_name: The task.
        queue_name: The queue.
        deliveries: The number of deliveries for execution.
        worker: The worker that parked it, as "host:pid".
        queued_at: When it was sent, in UTC.
    """

    task_id: str
    task_name: str
    queue_name: str
    deliveries: int
    worker: str | None
    queued_at: datetime


class QueueAdmin:
    """Counts, lists, releases and discards the tasks of a queue, and lists its schedules.

    Args:
        settings: The broker's settings.
        database: The queue's database.
        announce: Called with the names of queues that have due tasks.
    """

    def __init__(
        self,
        settings: QueueSettings,
        database: Database,
        announce: Callable[[Collection[str]], None],
    ) -> None:
        self._queue = settings.queue_table
        self._schedules = settings.models.schedules_table
        self._table = settings.table
        self._database = database
        self._announce = announce

    async def count(self, limit: int) -> list[QueueCount]:
        """Counts the tasks of each queue and task name; each count stops at the limit."""
        purpose = f"count the tasks of table {self._table}"
        rows = await self._database.fetch(self._count_tasks, {"size": limit}, purpose)
        return list(_add_up([Tally._make(row) for row in rows], limit))

    async def count_parked(self, queue_name: str | None, task_name: str | None) -> int:
        """The number of parked tasks, in a queue and of a task name; None is any."""
        purpose = f"count the parked tasks of table {self._table}"
        chosen = _filter(queue_name, task_name)
        [[count]] = await self._database.fetch(self._count_parked, chosen, purpose)
        return int(count)

    async def read_parked(
        self, limit: int, queue_name: str | None, task_name: str | None
    ) -> list[ParkedTask]:
        """At most `limit` parked tasks, in the order in which they were sent."""
        purpose = f"read the parked tasks of table {self._table}"
        parameters = _filter(queue_name, task_name)
        parameters |= {"size": limit, "most": max(limit, _MOST_SORTED)}
        rows = await self._database.fetch(self._select_parked, parameters, purpose)
        return [_parked_of(ParkedRow._make(row)) for row in rows]

    async def release(
        self,
        task_ids: Sequence[Any] | None = None,
        queue_name: str | None = None,
        task_name: str | None = None,
    ) -> set[Any]:
        """Makes parked tasks due now, as if they had just been sent, and notifies workers.

        It selects tasks by id, or by the two names. After a failure it can be repeated.

        Returns:
            The ids of the tasks that were released.
        """
        purpose = f"release parked tasks of table {self._table}"
        released = set()
        chosen = _filter(queue_name, task_name)
        async for rows in self._change(self._release, task_ids, chosen, purpose):
            self._announce({queue_name for _, queue_name in rows})
            released |= {task_id for task_id, _ in rows}
        return released

    async def discard(
        self,
        task_ids: Sequence[Any] | None = None,
        queue_name: str | None = None,
        task_name: str | None = None,
    ) -> set[Any]:
        """Deletes parked tasks; their results stay. Arguments and return value as release()."""
        purpose = f"discard parked tasks of table {self._table}"
        changes = self._change(self._discard, task_ids, _filter(queue_name, task_name), purpose)
        return {task_id async for rows in changes for task_id, _ in rows}

    async def read_schedules(self, limit: int) -> list[ScheduleInfo]:
        """At most `limit` schedules, by task name.

        Raises:
            ConfigurationError: The models have no Schedule.
        """
        if self._schedules is None:
            raise ConfigurationError(
                "the models have no table of schedules: create them with build_models(..., "
                "queue=True), or Models(..., Schedule=...) with a subclass of ScheduleMixin"
            )
        purpose = f"read the schedules of table {self._schedules.name}"
        rows = await self._database.fetch(self._list_schedules, {"size": limit}, purpose)
        found = []
        for row in rows:
            found.append(info_of_row(ListedSchedule._make(row)))
            await asyncio.sleep(0)  # a yearly cron expression takes a millisecond or two
        return found

    async def _change(
        self,
        statements: tuple[Executable, Executable],
        task_ids: Sequence[Any] | None,
        chosen: Mapping[str, Any],
        purpose: str,
    ) -> AsyncIterator[Sequence[Any]]:
        by_id, by_filter = statements
        if task_ids is not None:
            for some in in_slices(list(task_ids)):
                yield await self._database.fetch(by_id, {"task_ids": some}, purpose)
            return
        parameters = {**chosen, "size": _SLICE}
        while rows := await self._database.fetch(by_filter, parameters, purpose):
            yield rows

    # Each is compiled once and cached with the engine.

    @cached_property
    def _count_tasks(self) -> Select[Any]:
        return count_tasks(self._queue)

    @cached_property
    def _count_parked(self) -> Select[Any]:
        return count_parked(self._queue)

    @cached_property
    def _select_parked(self) -> Select[Any]:
        return select_parked(self._queue)

    @cached_property
    def _release(self) -> tuple[Executable, Executable]:
        return release_parked(self._queue, by_id=True), release_parked(self._queue)

    @cached_property
    def _discard(self) -> tuple[Executable, Executable]:
        return discard_parked(self._queue, by_id=True), discard_parked(self._queue)

    @cached_property
    def _list_schedules(self) -> Select[Any]:
        assert self._schedules is not None
        return list_schedules(self._schedules)


def _filter(queue_name: str | None, task_name: str | None) -> dict[str, Any]:
    return {"given_queue_name": queue_name, "given_task_name": task_name}


def _parked_of(row: ParkedRow) -> ParkedTask:
    # psycopg returns times in the session's time zone.
    queued_at = row.queued_at.astimezone(UTC)
    return ParkedTask(**{**row._asdict(), "task_id": str(row.task_id), "queued_at": queued_at})


def _add_up(tallies: Sequence[Tally], limit: int) -> Iterator[QueueCount]:
    """Sums the priorities and states of each queue and task name."""
    looked_at: Counter[tuple[str, int, str]] = Counter()
    groups: defaultdict[tuple[str, str], list[Tally]] = defaultdict(list)
    for each in tallies:
        looked_at[each.queue_name, each.priority, each.state] += each.tasks
        groups[each.queue_name, each.task_name].append(each)
    stopped = {(queue, state) for (queue, _, state), tasks in looked_at.items() if tasks >= limit}
    for (queue_name, task_name), group in groups.items():
        tasks: Counter[str] = Counter()
        for each in group:
            if each.state == "later":
                tasks["running"] += each.taken
                tasks["delayed"] += each.tasks - each.taken
            else:
                tasks[each.state] += each.tasks
        oldest = [each.oldest for each in group if each.oldest is not None]
        yield QueueCount(
            queue_name,
            task_name,
            **{name: tasks[name] for name in _STATES},
            oldest_waiting=max(oldest, default=None),
            at_least=tuple(n for n, state in _STATES.items() if (queue_name, state) in stopped),
        )
