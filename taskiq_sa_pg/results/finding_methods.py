"""Methods of a backend that find and show finished tasks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from taskiq_sa_pg.codec import Seconds
from taskiq_sa_pg.results.finding import DEFAULT_LIMIT, Outcome, Page, TaskDetails, check_query
from taskiq_sa_pg.results.runtime import Runtime
from taskiq_sa_pg.results.search import Where
from taskiq_sa_pg.results.settings import Settings


class FindingMethods(ABC):
    """Methods of SQLAlchemyResultBackend, which lists the errors that all of them raise."""

    settings: Settings

    @property
    @abstractmethod
    def runtime(self) -> Runtime:
        """The objects that exist between startup() and shutdown()."""

    async def find(
        self,
        where: Where = (),
        *,
        window: Seconds | None = None,
        outcome: Outcome | None = None,
        name: str | None = None,
        worker: str | None = None,
        label: Mapping[str, Any] | None = None,
        argument: Any = None,
        after: str | None = None,
        limit: int = DEFAULT_LIMIT,
    ) -> Page:
        """Returns a page of finished tasks, latest first, without their values; deletes nothing.

            page = await backend.find(outcome="failed", label={"user": 42}, window=86_400)

        Tasks are ordered by `finished_at`, then by task id, so consecutive pages neither skip nor
        repeat a task. All conditions must match. Expired results are not found. The query covers
        the last minute first, then slices of time that are each four times as long, until the page
        is full or the window ends. Without a window, a condition that few results match reads the
        whole table.

        Args:
            where: One or more conditions on the attributes of models.Result, as in iter_results().
            window: How far to look back from now: seconds or a timedelta. None has no limit.
            outcome: "succeeded" or "failed"; None for both.
            name: The task's name. name, worker and argument need TaskMetadataMiddleware.
            worker: The worker that executed the task.
            label: Values of labels by name. Compared as text: 42 matches "42", and "42" matches 42.
            argument: Values of recorded arguments by name (`{"order_id": 42}`) or by position
                (`{0: 42}`), or a single value that any argument may have. Compared as text.
            after: `next` of the previous page; None for the first page.
            limit: Maximum number of tasks, 1 to 1000.

        Raises:
            TypeError: `where` is not a SQLAlchemy expression.
            ConfigurationError: Another argument is invalid, or `where` refers to another class or
                table.
        """
        query = check_query(
            self.settings.models,
            where,
            window=window,
            outcome=outcome,
            name=name,
            worker=worker,
            label=label,
            argument=argument,
            after=after,
            limit=limit,
        )
        return await self.runtime.finding.find(query)

    async def get_details(self, task_id: str | UUID, *, with_result: bool = False) -> TaskDetails:
        """Returns everything that is stored for a finished task. It deletes nothing.

        Args:
            task_id: The task.
            with_result: Whether to read and decode the result, too. With PickleSerializer this can
                execute stored code. If decoding fails, nothing is raised: `undecodable` is the
                reason.

        Raises:
            ResultIsMissingError: The task has no result, or no longer has one.
        """
        column_id = self.settings.models.config.to_column_task_id(task_id)
        return await self.runtime.finding.read_details(column_id, with_result=with_result)
