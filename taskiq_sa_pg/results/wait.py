"""Waits for results and progress; notifications wake the waiting calls."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Iterable
from contextlib import aclosing
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar
from uuid import UUID

from pydantic import TypeAdapter
from taskiq import AsyncTaskiqTask, TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg.exceptions import ResultIsMissingError
from taskiq_sa_pg.models import TableConfig
from taskiq_sa_pg.results.reader import Reader
from taskiq_sa_pg.statements import StoredProgress
from taskiq_sa_pg.waiting import Waiters

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

Task = AsyncTaskiqTask[_T] | str | UUID


class Wait:
    """Waits for results and progress, and reads them.

    All methods raise:
        InvalidTaskIdError: The task-id column cannot store an id.
        TaskiqResultTimeoutError: The time limit has passed.
        ResultDecodeError: A value cannot be decoded.
        StorageError: PostgreSQL rejected a statement or is unreachable.
    """

    def __init__(self, config: TableConfig, reader: Reader, waiters: Waiters) -> None:
        self._config = config
        self._reader = reader
        self._waiters = waiters

    async def one(
        self, task: Task[Any], timeout: float | None, with_logs: bool
    ) -> TaskiqResult[Any]:
        """Returns a result as soon as it is stored."""
        column_id = self._column_id_of(task)
        limit = _TimeLimit(timeout)
        reader = self._reader
        with self._waiters.subscribe([self._waiters.result_topic(column_id)]) as subscription:
            while True:
                if reader.keep_results:
                    result = await limit.of(reader.get(column_id, with_logs))
                else:
                    # No time limit after this: a deleted result must be returned.
                    is_ready = await limit.of(reader.is_ready(column_id))
                    result = await reader.get(column_id, with_logs) if is_ready else None
                if result is not None:
                    return _restored(task, result)
                await limit.of_wait(subscription.woken())

    async def all(
        self, tasks: Iterable[Task[Any]], timeout: float | None, with_logs: bool
    ) -> list[TaskiqResult[Any]]:
        """Returns the results of all tasks in their order, when all of them are stored.

        Raises:
            ResultIsMissingError: A result was deleted before it was read.
        """
        column_ids = [(task, self._column_id_of(task)) for task in tasks]
        async with aclosing(self._become_ready(column_ids, timeout)) as parts:
            async for _ in parts:
                pass
        every = {column_id for _, column_id in column_ids}
        results = await self._reader.get_all(every, with_logs, needs_every=True)
        for task, column_id in column_ids:
            if column_id not in results:
                raise ResultIsMissingError(_id_of(task), self._config.qualified_name)
        return [_restored(task, results[column_id]) for task, column_id in column_ids]

    async def as_completed(
        self, tasks: Iterable[Task[Any]], timeout: float | None, with_logs: bool
    ) -> AsyncGenerator[tuple[Task[Any], TaskiqResult[Any]], None]:
        """Yields each task with its result, in the order of completion."""
        column_ids = [(task, self._column_id_of(task)) for task in tasks]
        is_kept = self._reader.keep_results
        async with aclosing(self._become_ready(column_ids, timeout)) as parts:
            async for ready in parts:
                # If results are deleted, one by one: a caller that stops early keeps the others.
                for some in [ready] if is_kept else [{c: ready[c]} for c in ready]:
                    results = await self._reader.get_all(some, with_logs)
                    for task in chain(*(some[column_id] for column_id in results)):
                        yield task, _restored(task, results[self._column_id_of(task)])

    async def watch_progress(
        self, task: Task[Any], timeout: float | None
    ) -> AsyncGenerator[TaskProgress[Any], None]:
        """Yields the progress of a task, each time it changes, until its result is stored."""
        async with aclosing(self.watch_progress_rows(task, timeout)) as rows:
            async for row in rows:
                yield self._reader.decode_progress(row)

    async def watch_progress_rows(
        self, task: Task[Any], timeout: float | None = None
    ) -> AsyncGenerator[StoredProgress, None]:
        """The same, with the metadata not decoded."""
        column_id = self._column_id_of(task)
        limit = _TimeLimit(timeout)
        reader = self._reader
        result = self._waiters.result_topic(column_id)
        topics = [result, self._waiters.progress_topic(column_id)]
        with self._waiters.subscribe(topics) as subscription:
            last = None
            is_over = await limit.of(reader.is_ready(column_id))
            while True:
                row = await limit.of(reader.read_progress(column_id))
                if row is not None and row != last:
                    yield row
                    last = row
                if is_over:
                    return
                woken = await limit.of_wait(subscription.woken())
                if result in woken:
                    # A result that is deleted when it is read may already be deleted.
                    is_over = not reader.keep_results or await limit.of(reader.is_ready(column_id))

    async def _become_ready(
        self, column_ids: Iterable[tuple[Task[Any], Any]], timeout: float | None
    ) -> AsyncGenerator[dict[Any, list[Task[Any]]], None]:
        """Yields tasks whose results are stored, by id, in groups as they complete."""
        limit = _TimeLimit(timeout)
        missing: dict[Any, list[Task[Any]]] = {}
        for task, column_id in column_ids:
            missing.setdefault(column_id, []).append(task)
        topics = {self._waiters.result_topic(column_id): column_id for column_id in missing}
        with self._waiters.subscribe(topics) as subscription:
            asked = set(missing)
            while missing:
                ready = await limit.of(self._reader.find_ready(asked)) if asked else set()
                if ready:
                    yield {column_id: missing.pop(column_id) for column_id in ready}
                if missing:
                    woken = await limit.of_wait(subscription.woken())
                    asked = {topics[topic] for topic in woken} & missing.keys()

    def _column_id_of(self, task: Task[Any]) -> Any:
        return self._config.to_column_task_id(_id_of(task))


class _TimeLimit:
    """A time limit in seconds for several awaitables together.

    Not one asyncio.timeout() around them: in an asynchronous iterator, that would also cancel the
    code of its user between two steps.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        if seconds is not None and seconds >= 0:
            self._deadline = asyncio.get_running_loop().time() + seconds
        # A timeout of 0 has no effect on queries, until the first wait.
        self._is_looking = seconds == 0

    async def of_wait(self, awaitable: Awaitable[_T]) -> _T:
        self._is_looking = False
        return await self.of(awaitable)

    async def of(self, awaitable: Awaitable[_T]) -> _T:
        if self._is_looking:
            return await awaitable
        try:
            async with asyncio.timeout_at(self._deadline):
                return await awaitable
        except TimeoutError:
            raise TaskiqResultTimeoutError(timeout=self._seconds) from None


def _id_of(task: Task[Any]) -> str | UUID:
    if isinstance(task, str | UUID):
        return task
    given: Any = task  # other types are rejected later, as an id
    task_id: str | UUID = getattr(given, "task_id", given)
    return task_id


def _restored(task: Task[Any], result: TaskiqResult[Any]) -> TaskiqResult[Any]:
    """The result with the task's declared return type, as from the task's own get_result()."""
    return_type: Any = None if isinstance(task, str | UUID) else task.return_type
    return restore(_id_of(task), result, return_type)


def restore(task_id: str | UUID, result: TaskiqResult[Any], return_type: Any) -> TaskiqResult[Any]:
    """Converts the return value to the type; keeps the value if validation fails."""
    if return_type is not None and not result.is_err:
        try:
            result.return_value = _adapter(return_type).validate_python(result.return_value)
        except Exception as exc:  # noqa: BLE001 - types and validators are the application's
            # Returned in any case, because it may already be deleted.
            complaint = "cannot convert the result of task %s to %s: %s"
            logger.warning(complaint, task_id, return_type, type(exc).__qualname__)
    return result


@lru_cache
def _adapter(return_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(return_type)
