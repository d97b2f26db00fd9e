"""The methods of SQLAlchemyBroker for the administration of its queues."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from taskiq_sa_pg.broker.admin import MAX_ROWS, ParkedTask, QueueCount
from taskiq_sa_pg.broker.runtime import QueueRuntime
from taskiq_sa_pg.broker.schedule_info import ScheduleInfo
from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.exceptions import ConfigurationError, check_whole
from taskiq_sa_pg.models import flaw_of_key, shortened


class QueueMethods(ABC):
    """Administration methods of SQLAlchemyBroker; the broker has to be started."""

    settings: QueueSettings

    @property
    @abstractmethod
    def runtime(self) -> QueueRuntime:
        """The runtime between startup() and shutdown()."""

    async def get_queues(self, limit: int = 10_000) -> list[QueueCount]:
        """Counts the tasks of each queue and task name: waiting, delayed, running and parked.

        It reads at most `limit` tasks of each priority and state of a queue, in the index, so its
        cost is bounded. Queues without tasks are not listed.

        Args:
            limit: Where counting stops; `QueueCount.at_least` then names the count.

        Raises:
            ConfigurationError: limit is not a whole number above 0.
        """
        check_whole("limit", limit)
        return await self.runtime.admin.count(min(limit, MAX_ROWS))

    async def get_parked(
        self, queue_name: str | None = None, task_name: str | None = None, limit: int = 100
    ) -> list[ParkedTask]:
        """Lists parked tasks, oldest first: tasks delivered too often and never acknowledged.

        At most 10,000 tasks of each queue and priority are sorted.

        Args:
            queue_name: Only tasks in this queue.
            task_name: Only tasks of this name.
            limit: Maximum number of tasks to return.

        Raises:
            ConfigurationError: limit is not a whole number above 0, or a name is invalid.
        """
        check_whole("limit", limit)
        _check_names(queue_name, task_name)
        return await self.runtime.admin.read_parked(min(limit, MAX_ROWS), queue_name, task_name)

    async def release_parked(
        self,
        task_ids: Iterable[str | UUID] | None = None,
        *,
        queue_name: str | None = None,
        task_name: str | None = None,
    ) -> int:
        """Makes parked tasks due now, as if they had just been sent, and notifies workers.

        The result of a task stays an error until it has run. Each statement releases at most
        1,000 tasks and is committed separately, so a call that failed can be repeated.

        Args:
            task_ids: Only these tasks, if they are parked. None means all parked tasks.
            queue_name: Only tasks in this queue; not together with task_ids.
            task_name: Only tasks of this name; not together with task_ids.

        Returns:
            The number of tasks released.

        Raises:
            TypeError: task_ids is a single str.
            InvalidTaskIdError: The task-id column cannot hold an id.
            ConfigurationError: task_ids together with a name, or an invalid name.
        """
        column_ids = self._column_ids("release_parked", task_ids, queue_name, task_name)
        return len(await self.runtime.admin.release(column_ids, queue_name, task_name))

    async def discard_parked(
        self,
        task_ids: Iterable[str | UUID] | None = None,
        *,
        queue_name: str | None = None,
        task_name: str | None = None,
    ) -> int:
        """Deletes parked tasks. Their results, which are errors, stay.

        Arguments, return value and errors are those of release_parked(). Without arguments, it
        deletes all parked tasks.
        """
        column_ids = self._column_ids("discard_parked", task_ids, queue_name, task_name)
        return len(await self.runtime.admin.discard(column_ids, queue_name, task_name))

    async def get_schedules(self, limit: int = 1_000) -> list[ScheduleInfo]:
        """Lists the schedules of SQLAlchemyScheduleSource by task name, with their next tick.

        Args:
            limit: Maximum number of schedules to return.

        Raises:
            ConfigurationError: limit is not a whole number above 0, or the models have no Schedule.
        """
        check_whole("limit", limit)
        return await self.runtime.admin.read_schedules(min(limit, MAX_ROWS))

    def _column_ids(
        self,
        method: str,
        task_ids: Iterable[str | UUID] | None,
        queue_name: str | None,
        task_name: str | None,
    ) -> list[Any] | None:
        _check_names(queue_name, task_name)
        if task_ids is None:
            return None
        if isinstance(task_ids, str):
            raise TypeError(f"{method}() takes several tasks, not one str: {task_ids!r}")
        if queue_name is not None or task_name is not None:
            raise ConfigurationError(
                "queue_name and task_name select among all parked tasks: do not pass task_ids as "
                "well"
            )
        return [self.settings.models.config.to_column_task_id(task_id) for task_id in task_ids]


def _check_names(queue_name: object, task_name: object) -> None:
    for what, name in (("queue_name", queue_name), ("task_name", task_name)):
        if name is None:
            continue
        if not isinstance(name, str):
            raise ConfigurationError(f"{what} must be a str, or None, not {name!r}")
        if flaw := flaw_of_key(name):
            raise ConfigurationError(f"{what} {shortened(name)!r} {flaw}")
