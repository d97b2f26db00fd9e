"""What a backend can do with finished tasks that it does not know by their ids."""

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
    """Methods of SQLAlchemyResultBackend, which says which errors all of them raise."""

    settings: Settings

    @property
    @abstractmethod
    def runtime(self) -> Runtime:
        """What works between startup() and shutdown()."""

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
        """Finished tasks, the latest first, a page at a time; no payload is read, none is deleted.

            page = await backend.find(outcome="failed", label={"user": 42}, window=86_400)

        The order is that of `finished_at` and, in the same instant, of the task id, so that pages
        that follow each other skip no task and repeat none. All conditions must hold. Expired
        results are not found. PostgreSQL is asked for the last minute first, and then for slices of
        time four times as long until the page is full or the window is exhausted: without a window,
        a condition that few results meet reads the whole table.

        Args:
            where: A condition on the attributes of models.Result, or several, as for
                iter_results().
            window: How far to look back from now, in seconds or as a timedelta; None for all.
            outcome: "succeeded" or "failed"; None for both.
            name: The task's name. This, worker and argument need TaskMetadataMiddleware.
            worker: Who executed it.
            label: Values of labels by name. Compared as text: 42 finds "42" and "42" finds 42.
            argument: Values of recorded arguments by name (`{"order_id": 42}`) or by position
                (`{0: 42}`), or one value that any argument may have; compared as text.
            after: `next` of the page before; None for the first page.
            limit: How many tasks at most, 1 to 1000.

        Raises:
            TypeError: where is no SQLAlchemy expression.
            ConfigurationError: Another argument that cannot be, which it names; or where is about
                another class or table.
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
        """Everything that is stored of a finished task; it is never deleted by this.

        Args:
            task_id: The task.
            with_result: Whether to read and decode the result, too, which with PickleSerializer
                executes what was stored. One that cannot be decoded raises nothing: `undecodable`
                says why.

        Raises:
            ResultIsMissingError: There is no result (any more).
        """
        column_id = self.settings.models.config.to_column_task_id(task_id)
        return await self.runtime.finding.read_details(column_id, with_result=with_result)
