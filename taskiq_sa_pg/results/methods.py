"""What a backend can do beside taskiq's contract: many at once, by push, by condition."""

from collections.abc import AsyncGenerator, Iterable
from typing import Any, Final, Generic, TypeVar, overload
from uuid import UUID

from taskiq import AsyncBroker, AsyncTaskiqTask, TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg.codec import RowDecoder, Seconds
from taskiq_sa_pg.exceptions import ConfigurationError, check_number, check_whole
from taskiq_sa_pg.results.finding_methods import FindingMethods
from taskiq_sa_pg.results.pruner import Pruned, check_limits
from taskiq_sa_pg.results.search import DEFAULT_BATCH_SIZE, OrderBy, Where, find_results
from taskiq_sa_pg.results.status import TaskStatus
from taskiq_sa_pg.results.wait import Task
from taskiq_sa_pg.results.workers import WorkerInfo

_ReturnType = TypeVar("_ReturnType")
_T = TypeVar("_T")
_Id = TypeVar("_Id", bound=str | UUID)

# What PostgreSQL calls an integer.
_MAX_ROWS: Final = 2_147_483_647


class ResultMethods(FindingMethods, Generic[_ReturnType]):
    """Methods of SQLAlchemyResultBackend, which says which errors all of them raise."""

    async def get_results(
        self, task_ids: Iterable[_Id], with_logs: bool = False
    ) -> dict[_Id, TaskiqResult[_ReturnType]]:
        """The results that are ready, by task id; in one statement for every 200 ids.

        With keep_results=False they are deleted as they are read, all in one transaction. One
        that cannot be read back comes as a failure whose `error` is the ResultDecodeError, and
        stays in the table.

        Raises:
            TypeError: task_ids is one str, whose letters would be taken for ids.
        """
        _refuse_str("get_results", task_ids)
        # A UUID has several spellings: those of one task get the same result.
        column_ids = {
            task_id: self.settings.models.config.to_column_task_id(task_id) for task_id in task_ids
        }
        results = await self.runtime.reader.get_all({*column_ids.values()}, with_logs)
        return {t: results[c] for t, c in column_ids.items() if c in results}

    @overload
    async def wait_result(
        self, task: AsyncTaskiqTask[_T], timeout: float | None = ..., with_logs: bool = ...
    ) -> TaskiqResult[_T]: ...
    @overload
    async def wait_result(
        self, task: str | UUID, timeout: float | None = ..., with_logs: bool = ...
    ) -> TaskiqResult[_ReturnType]: ...
    async def wait_result(
        self, task: Task[Any], timeout: float | None = None, with_logs: bool = False
    ) -> TaskiqResult[Any]:
        """The result, as soon as it is stored.

        A task's declared return type is restored, as the task's own wait_result() does. With
        keep_results=False one of several waiters gets the result, and the others wait on.

        Args:
            task: What kiq() returned, or a task id.
            timeout: Seconds to wait; None, or as for taskiq a negative number, sets no limit.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TaskiqResultTimeoutError: There was no result in time.
            ResultDecodeError: The result cannot be read back; it stays in the table.
            ConfigurationError: timeout is no number.
        """
        _check_timeout(timeout)
        return await self.runtime.wait.one(task, timeout, with_logs)

    @overload
    async def wait_results(
        self,
        tasks: Iterable[AsyncTaskiqTask[_T]],
        timeout: float | None = ...,
        with_logs: bool = ...,
    ) -> list[TaskiqResult[_T]]: ...
    @overload
    async def wait_results(
        self, tasks: Iterable[str | UUID], timeout: float | None = ..., with_logs: bool = ...
    ) -> list[TaskiqResult[_ReturnType]]: ...
    @overload
    async def wait_results(
        self, tasks: Iterable[Task[Any]], timeout: float | None = ..., with_logs: bool = ...
    ) -> list[TaskiqResult[Any]]: ...
    async def wait_results(
        self, tasks: Iterable[Task[Any]], timeout: float | None = None, with_logs: bool = False
    ) -> list[TaskiqResult[Any]]:
        """The results of several tasks in their order, as soon as all are stored.

        Arguments as wait_result(), for all of them together. With keep_results=False none is
        deleted before all are there. One that cannot be read back comes as a failure, as from
        get_results().

        Raises:
            TaskiqResultTimeoutError: Not all results were there in time.
            ResultIsMissingError: Somebody else deleted a result as soon as it was there.
            ConfigurationError: timeout is no number.
            TypeError: tasks is one str, whose letters would be taken for ids.
        """
        _refuse_str("wait_results", tasks)
        _check_timeout(timeout)
        return await self.runtime.wait.all(tasks, timeout, with_logs)

    @overload
    def as_completed(
        self,
        tasks: Iterable[AsyncTaskiqTask[_T]],
        timeout: float | None = ...,
        with_logs: bool = ...,
    ) -> AsyncGenerator[tuple[AsyncTaskiqTask[_T], TaskiqResult[_T]], None]: ...
    @overload
    def as_completed(
        self, tasks: Iterable[_Id], timeout: float | None = ..., with_logs: bool = ...
    ) -> AsyncGenerator[tuple[_Id, TaskiqResult[_ReturnType]], None]: ...
    @overload
    def as_completed(
        self, tasks: Iterable[Task[Any]], timeout: float | None = ..., with_logs: bool = ...
    ) -> AsyncGenerator[tuple[Task[Any], TaskiqResult[Any]], None]: ...
    def as_completed(
        self, tasks: Iterable[Task[Any]], timeout: float | None = None, with_logs: bool = False
    ) -> AsyncGenerator[tuple[Any, TaskiqResult[Any]], None]:
        """Iterates over several tasks with their results, as they complete.

            async for task, result in backend.as_completed(tasks): ...

        Arguments as wait_result(); the time limit is for the last result. With
        keep_results=False a result is deleted as it comes; one that somebody else deletes first
        does not come. One that cannot be read back comes as a failure, as from get_results().

        Raises:
            TaskiqResultTimeoutError: Not all results were there in time.
            ConfigurationError: timeout is no number.
            TypeError: tasks is one str, whose letters would be taken for ids.
        """
        _refuse_str("as_completed", tasks)
        _check_timeout(timeout)
        return self.runtime.wait.as_completed(tasks, timeout, with_logs)

    def watch_progress(
        self, task: Task[Any], timeout: float | None = None
    ) -> AsyncGenerator[TaskProgress[Any], None]:
        """Iterates over a task's progress, each time it has changed, until the result is there.

            async for progress in backend.watch_progress(task): ...

        Arguments as wait_result(). The first is the progress as it is now, if there is one. Of
        changes that follow each other faster than they are taken, the last comes.

        Raises:
            TaskiqResultTimeoutError: There was no result in time.
            ResultDecodeError: The metadata cannot be read back.
            ConfigurationError: timeout is no number.
        """
        _check_timeout(timeout)
        return self.runtime.wait.watch_progress(task, timeout)

    async def get_status(self, task_id: str | UUID) -> TaskStatus:
        """A task's status: "queued", "started", "lost", "retrying", "succeeded" and so on.

        Without track= it is "unknown" until there is a result. A result that was deleted, be it
        because it was read once or because prune() found it expired, is "unknown" again.
        """
        column_id = self.settings.models.config.to_column_task_id(task_id)
        return await self.runtime.statuses.read(
            column_id, task_id if isinstance(task_id, str) else str(task_id)
        )

    async def get_running(self, limit: int = 1_000) -> list[TaskStatus]:
        """The tasks that are being executed, those that were started first before the others.

        One whose worker was killed is among them as "lost", until it is started again or, with
        progress_ttl, pruned.

        Raises:
            ConfigurationError: limit, how many at most, is not above 0.
        """
        check_whole("limit", limit)
        return await self.runtime.statuses.read_running(min(limit, _MAX_ROWS))

    async def get_workers(self) -> list[WorkerInfo]:
        """The processes that execute tasks, by name, with those that were not stopped properly.

        A process has a row while it runs, if its broker has a TaskMetadataMiddleware and its
        backend track="started". Where there are no such processes, or no table of them, the list
        is empty. Rows that were not renewed for a day are deleted.
        """
        return await self.runtime.workers.read()

    async def set_status(self, status: TaskStatus) -> None:
        """Stores that a task is "queued", "started" or "retrying"; with "unknown", forgets it.

        TaskMetadataMiddleware does it for the tasks of its broker. A status of a later attempt
        stays, and so does one of the same attempt that was started later; but one that was queued
        later than that, of a task id that is used again, takes its place. Its finished_at is not
        used. A PostgreSQL that cannot be reached is tried for 5 seconds.

        Raises:
            ConfigurationError: Without track=, or another state.
        """
        if self.settings.track is None:
            raise ConfigurationError('set_status() is for backends with track="started"')
        column_id = self.settings.models.config.to_column_task_id(status.task_id)
        await self.runtime.statuses.write(column_id, status)

    async def resend(self, broker: AsyncBroker, task_id: str | UUID) -> AsyncTaskiqTask[Any]:
        """Sends a finished task again, from the arguments and labels in the row of its result.

        It gets a new task id, and the label `rerun_of` with the old one. Its arguments must have
        been recorded by TaskMetadataMiddleware (record_args=True), and are sent in the JSON-able
        form in which it records them. Labels of retries, delays, schedules and tracing are left
        out, but for a `delay` that the task itself declares. The task need not be registered in
        this process.

        Args:
            broker: Where it is sent, which has to be started.
            task_id: The task.

        Raises:
            ResultIsMissingError: There is no result (any more).
            ResultDecodeError: Its labels cannot be read back.
            NotResendableError: Its arguments were not recorded, or were redacted.
            SendTaskError: The broker could not send it.
            ConfigurationError: broker is no broker.
        """
        column_id = self.settings.models.config.to_column_task_id(task_id)
        text = task_id if isinstance(task_id, str) else str(task_id)
        return await self.runtime.resender.resend(broker, column_id, text)

    def decode(self, row: object, with_logs: bool = False) -> TaskiqResult[Any]:
        """The result in a row that you have selected yourself, whether it has expired or not.

        It asks nothing and needs no startup(), so it works with a synchronous Session too.

        Args:
            row: An instance of models.Result, a Row with one in it, or a Row or mapping of its
                columns by their names. `is_err`, `return_value`, `error` and `execution_time` must
                be there, and are as SQLAlchemy's types give them; without `labels` there are none.
            with_logs: Whether to fill the deprecated field `log`, which then must be there too.

        Raises:
            MissingColumnsError: The select has left columns out.
            ResultDecodeError: A value cannot be read back.
            TypeError: It is no row, or one with several results.
        """
        settings = self.settings
        return RowDecoder(settings.codec, settings.models).decode(row, with_logs=with_logs)

    def iter_results(
        self,
        where: Where = (),
        *,
        order_by: OrderBy = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
        with_logs: bool = False,
    ) -> AsyncGenerator[tuple[str, TaskiqResult[_ReturnType]], None]:
        """Iterates over the results that meet conditions, with their task ids.

            async for task_id, result in backend.iter_results(models.Result.is_err): ...

        They are those of one moment, without the expired ones, and none is deleted. A server-side
        cursor gives them a batch at a time, so that memory does not grow with their number. Until
        the end it has a connection of its own, beside max_connections, and a transaction, which
        keeps PostgreSQL from cleaning up: do not dawdle, and where you stop before the end, close
        the generator (`contextlib.aclosing`). A result that cannot be read back comes as a failure
        whose `error` is the ResultDecodeError. A statement is tried again before the first result;
        later, when the connection is lost, the rest does not come.

        Args:
            where: A condition on the attributes of models.Result, or several, which all must hold.
            order_by: What to order by, one expression or several; without, it is any order.
            batch_size: How many rows are fetched and kept in memory at once.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TypeError: where or order_by is no SQLAlchemy expression.
            ConfigurationError: They are about another class or table, or batch_size is below 1.
        """
        statement = find_results(self.settings.models, where, order_by, batch_size)
        return self.runtime.search.iterate(statement, batch_size, with_logs)

    async def forget(self, task_ids: Iterable[str | UUID]) -> int:
        """Deletes results, unread, with progress and status of these tasks.

        In a statement for every 200 ids, each committed by itself. It tells nobody: whoever waits
        for one of them waits on.

        Returns:
            How many results there were, expired ones that were not yet pruned included.

        Raises:
            TypeError: task_ids is one str, whose letters would be taken for ids.
        """
        _refuse_str("forget", task_ids)
        column_ids = {
            self.settings.models.config.to_column_task_id(task_id) for task_id in task_ids
        }
        return await self.runtime.search.forget(column_ids)

    async def prune(self, limit: int | None = None, time_budget: Seconds | None = None) -> Pruned:
        """Deletes expired results with their progress, and what is older than progress_ttl.

        In transactions of at most 500 rows. Where somebody else has locked one of them for longer
        than half a second, they are left for the next time.

        Args:
            limit: How many rows to delete at most; progress and status of expired results are not
                counted.
            time_budget: Seconds, or a timedelta, after which no further transaction is begun.

        Raises:
            ConfigurationError: limit or time_budget is not above 0.
        """
        seconds = check_limits(limit, time_budget)
        rows = None if limit is None else min(limit, _MAX_ROWS)
        return await self.runtime.pruner.run(rows, seconds)


def _refuse_str(name: str, tasks: object) -> None:
    if isinstance(tasks, str):
        raise TypeError(f"{name}() takes several tasks, not one str: {tasks!r}")


def _check_timeout(timeout: object) -> None:
    check_number("timeout", timeout, or_none=True)
