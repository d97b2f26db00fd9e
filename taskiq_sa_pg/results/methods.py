"""Methods of a backend in addition to taskiq's contract."""

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

# PostgreSQL's largest integer.
_MAX_ROWS: Final = 2_147_483_647


class ResultMethods(FindingMethods, Generic[_ReturnType]):
    """Methods of SQLAlchemyResultBackend, which lists the errors that all of them raise."""

    async def get_results(
        self, task_ids: Iterable[_Id], with_logs: bool = False
    ) -> dict[_Id, TaskiqResult[_ReturnType]]:
        """Returns the available results by task id, with one statement for every 200 ids.

        With keep_results=False they are deleted when they are read, all in one transaction. A
        result that cannot be decoded is returned as a failure whose `error` is the
        ResultDecodeError, and is not deleted.

        Raises:
            TypeError: task_ids is a str, not an iterable of ids.
        """
        _refuse_str("get_results", task_ids)
        # A UUID has several spellings, which all get the result of their task.
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
        """Waits for a task's result and returns it as soon as it is stored.

        The return value has the task's declared return type, as from the task's own wait_result().
        With keep_results=False only one of several waiting clients receives the result; the others
        continue to wait.

        Args:
            task: The task that kiq() returned, or a task id.
            timeout: Seconds to wait. None or a negative number waits for ever; 0 checks once.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TaskiqResultTimeoutError: There was no result in time.
            ResultDecodeError: The result cannot be decoded; it is not deleted.
            ConfigurationError: timeout is not a number.
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
        """Waits for several tasks and returns their results in the same order.

        The arguments are those of wait_result(); the timeout is for all results together. With
        keep_results=False no result is deleted before all are stored. A result that cannot be
        decoded is returned as a failure, as from get_results().

        Raises:
            TaskiqResultTimeoutError: Not all results were stored in time.
            ResultIsMissingError: Another client deleted a result after it was stored.
            ConfigurationError: timeout is not a number.
            TypeError: tasks is a str, not an iterable of tasks.
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
        """Iterates over several tasks with their results, in the order of completion.

            async for task, result in backend.as_completed(tasks): ...

        The arguments are those of wait_result(); the timeout is for all results together. With
        keep_results=False each result is deleted when it is yielded; a result that another client
        deletes first is skipped. A result that cannot be decoded is yielded as a failure, as from
        get_results().

        Raises:
            TaskiqResultTimeoutError: Not all results were stored in time.
            ConfigurationError: timeout is not a number.
            TypeError: tasks is a str, not an iterable of tasks.
        """
        _refuse_str("as_completed", tasks)
        _check_timeout(timeout)
        return self.runtime.wait.as_completed(tasks, timeout, with_logs)

    def watch_progress(
        self, task: Task[Any], timeout: float | None = None
    ) -> AsyncGenerator[TaskProgress[Any], None]:
        """Iterates over a task's progress, each time it changes, until its result is stored.

            async for progress in backend.watch_progress(task): ...

        The arguments are those of wait_result(). The current progress is yielded first, if any. If
        progress changes faster than you iterate, only the latest is yielded.

        Raises:
            TaskiqResultTimeoutError: There was no result in time.
            ResultDecodeError: The metadata cannot be decoded.
            ConfigurationError: timeout is not a number.
        """
        _check_timeout(timeout)
        return self.runtime.wait.watch_progress(task, timeout)

    async def get_status(self, task_id: str | UUID) -> TaskStatus:
        """Returns a task's status: "queued", "started", "lost", "retrying", "succeeded" and so on.

        Without track= it is "unknown" until there is a result. When the result is deleted, by
        keep_results=False, prune() or forget(), the status is "unknown" again.
        """
        column_id = self.settings.models.config.to_column_task_id(task_id)
        return await self.runtime.statuses.read(
            column_id, task_id if isinstance(task_id, str) else str(task_id)
        )

    async def get_running(self, limit: int = 1_000) -> list[TaskStatus]:
        """Returns at most `limit` tasks that are being executed, in the order of their start.

        A task whose worker was killed is included as "lost", until it is started again or, with
        progress_ttl, pruned.

        Raises:
            ConfigurationError: limit is not a whole number above 0.
        """
        check_whole("limit", limit)
        return await self.runtime.statuses.read_running(min(limit, _MAX_ROWS))

    async def get_workers(self) -> list[WorkerInfo]:
        """Returns the processes that execute tasks, by name, and those that ended unexpectedly.

        A process has a row while it runs, if its broker has TaskMetadataMiddleware and its backend
        has track="started". The list is empty if there are no such processes, or no workers table.
        Rows that were not renewed for a day are deleted.
        """
        return await self.runtime.workers.read()

    async def set_status(self, status: TaskStatus) -> None:
        """Stores a task's state: "queued", "started" or "retrying"; "unknown" deletes its status.

        TaskMetadataMiddleware calls it for the tasks of its broker. It does not replace the status
        of a later attempt, or of the same attempt with a later start. Exception: a status that was
        queued after these always replaces them, because the task id is in use again. finished_at
        is ignored. If PostgreSQL is unreachable, it retries for 5 seconds.

        Raises:
            ConfigurationError: The backend has no track=, or the state is another one.
        """
        if self.settings.track is None:
            raise ConfigurationError('set_status() needs a backend with track="started"')
        column_id = self.settings.models.config.to_column_task_id(status.task_id)
        await self.runtime.statuses.write(column_id, status)

    async def resend(self, broker: AsyncBroker, task_id: str | UUID) -> AsyncTaskiqTask[Any]:
        """Sends a finished task again, with the arguments and labels in the row of its result.

        The new task gets a new task id, and the label `rerun_of` with the old id. The arguments
        must have been recorded by TaskMetadataMiddleware(record_args=True); they are sent in the
        recorded, JSON-able form. Labels of retries, delays, schedules and tracing are omitted,
        except a `delay` that the task itself declares. The task need not be registered in this
        process.

        Args:
            broker: The broker that sends it; must be started.
            task_id: The task.

        Raises:
            ResultIsMissingError: The task has no result, or no longer has one.
            ResultDecodeError: The labels cannot be decoded.
            NotResendableError: The arguments were not recorded, or were redacted.
            SendTaskError: The broker could not send the task.
            ConfigurationError: broker is not a taskiq broker.
        """
        column_id = self.settings.models.config.to_column_task_id(task_id)
        text = task_id if isinstance(task_id, str) else str(task_id)
        return await self.runtime.resender.resend(broker, column_id, text)

    def decode(self, row: object, with_logs: bool = False) -> TaskiqResult[Any]:
        """Returns the result in a row that you selected yourself, even if it has expired.

        It runs no query and needs no startup(), so it also works with a synchronous Session.

        Args:
            row: An instance of models.Result, a Row that contains one, or a Row or mapping of its
                columns by name. `is_err`, `return_value`, `error` and `execution_time` are
                required, with values as SQLAlchemy's types return them. `labels` is optional.
            with_logs: Whether to fill the deprecated field `log`, which is then required, too.

        Raises:
            MissingColumnsError: The select omits required columns.
            ResultDecodeError: A value cannot be decoded.
            TypeError: row is not a row, or has several results.
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
        """Iterates over the results that match conditions, with their task ids.

            async for task_id, result in backend.iter_results(models.Result.is_err): ...

        It reads one snapshot, without expired results, and deletes nothing. A server-side cursor
        fetches one batch at a time, so memory does not grow with the number of results. Until the
        end it uses one connection in addition to max_connections, and a transaction, which delays
        vacuum: iterate without pauses. If you stop early, close the generator
        (`contextlib.aclosing`). A result that cannot be decoded is yielded as a failure whose
        `error` is the ResultDecodeError. Transient errors are retried only before the first
        result; if the connection is lost later, StorageError is raised.

        Args:
            where: One or more conditions on the attributes of models.Result; all must match.
            order_by: One or more expressions to order by; without them the order is undefined.
            batch_size: Number of rows that are fetched and kept in memory at once.
            with_logs: Whether to fill the deprecated field `log`.

        Raises:
            TypeError: where or order_by is not a SQLAlchemy expression.
            ConfigurationError: They refer to another class or table, or batch_size is below 1.
        """
        statement = find_results(self.settings.models, where, order_by, batch_size)
        return self.runtime.search.iterate(statement, batch_size, with_logs)

    async def forget(self, task_ids: Iterable[str | UUID]) -> int:
        """Deletes the results, progress and status of tasks without reading them.

        It runs one statement for every 200 ids, each in its own transaction. No notification is
        sent; clients that wait for such a task continue to wait.

        Returns:
            Number of deleted results, including expired ones that were not pruned yet.

        Raises:
            TypeError: task_ids is a str, not an iterable of ids.
        """
        _refuse_str("forget", task_ids)
        column_ids = {
            self.settings.models.config.to_column_task_id(task_id) for task_id in task_ids
        }
        return await self.runtime.search.forget(column_ids)

    async def prune(self, limit: int | None = None, time_budget: Seconds | None = None) -> Pruned:
        """Deletes expired results, and progress and status that are older than progress_ttl.

        Progress and status of an expired result are deleted with it. Each transaction deletes
        at most 500 rows. If another transaction locks one of them for longer than half a second,
        these rows are left for the next run.

        Args:
            limit: Maximum number of rows to delete. The progress and status of expired results do
                not count.
            time_budget: Seconds, or a timedelta, after which no further transaction begins.

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
