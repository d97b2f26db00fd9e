"""Reading results and progress: now, once they are there, or as they come."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar

from pydantic import TypeAdapter
from taskiq import AsyncTaskiqTask, TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.exceptions import ResultIsMissingError
from taskiq_sa_pg.operations import Operations
from taskiq_sa_pg.waiting import Topic, Waiting

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

Task = AsyncTaskiqTask[_T] | str


class Results:
    """Reads what the operations store, and deletes it as it is read unless results are kept.

    Raises everywhere:
        InvalidTaskIdError: The task-id column cannot hold an id.
        ResultDecodeError: A value cannot be read back.
        StorageError: PostgreSQL could not be asked.
    """

    def __init__(
        self,
        operations: Operations,
        waiting: Waiting,
        codec: Codec,
        config: TableConfig,
        *,
        keep_results: bool,
    ) -> None:
        self._operations = operations
        self._waiting = waiting
        self._codec = codec
        self._config = config
        self._keep_results = keep_results

    async def is_ready(self, task_id: str) -> bool:
        """Whether there is a result; without a statement if somebody asks again and again."""
        column_id = self._config.to_column_task_id(task_id)
        return await self._waiting.is_ready(
            str(column_id), lambda: self._operations.is_ready(column_id, task_id)
        )

    async def get(self, task_id: str, with_logs: bool) -> TaskiqResult[Any] | None:
        """A result, None if there is none."""
        return await self._get(self._config.to_column_task_id(task_id), task_id, with_logs)

    async def get_all(
        self, task_ids: Iterable[str], with_logs: bool
    ) -> dict[str, TaskiqResult[Any]]:
        """The results that are there, by id."""
        # A UUID has several spellings: those of one task get the same result.
        column_ids = {task_id: self._config.to_column_task_id(task_id) for task_id in task_ids}
        results = await self._get_all({c: t for t, c in column_ids.items()}, with_logs)
        return {t: results[c] for t, c in column_ids.items() if c in results}

    async def get_progress(self, task_id: str) -> TaskProgress[Any] | None:
        """The progress of a task, None if there is none."""
        column_id = self._config.to_column_task_id(task_id)
        row = await self._operations.read_progress(column_id, task_id)
        return None if row is None else self._codec.decode_progress(task_id, row)

    async def wait(
        self, task: Task[Any], timeout: float | None, with_logs: bool
    ) -> TaskiqResult[Any]:
        """A result, once it is there."""
        task_id = _id_of(task)
        column_id = self._config.to_column_task_id(task_id)
        limit = _TimeLimit(timeout)
        with self._waiting.subscribe([self._result_topic(column_id)]) as subscription:
            while True:
                if self._keep_results:
                    result = await limit.of(self._get(column_id, task_id, with_logs))
                else:
                    # To take it has no limit: what was deleted must be returned.
                    is_ready = await limit.of(self._operations.is_ready(column_id, task_id))
                    result = await self._get(column_id, task_id, with_logs) if is_ready else None
                if result is not None:
                    return _restored(task, result)
                await limit.of_wait(subscription.woken())

    async def wait_all(
        self, tasks: Iterable[Task[Any]], timeout: float | None, with_logs: bool
    ) -> list[TaskiqResult[Any]]:
        """The results of all the tasks, once they are all there.

        Raises:
            ResultIsMissingError: One was deleted again before it was read.
        """
        tasks = list(tasks)
        async for _ in self._become_ready(tasks, timeout):
            pass
        results = await self.get_all(map(_id_of, tasks), with_logs)
        for task in tasks:
            if _id_of(task) not in results:
                raise ResultIsMissingError(_id_of(task), self._config.qualified_name)
        return [_restored(task, results[_id_of(task)]) for task in tasks]

    async def as_completed(
        self, tasks: Iterable[Task[Any]], timeout: float | None, with_logs: bool
    ) -> AsyncGenerator[tuple[Task[Any], TaskiqResult[Any]], None]:
        """Each task with its result, as they come."""
        async for ready in self._become_ready(list(tasks), timeout):
            # Those to be deleted one by one: whoever stops in the middle leaves the others there.
            for some in [list(chain(*ready))] if self._keep_results else ready:
                results = await self.get_all(map(_id_of, some), with_logs)
                for task in some:
                    if _id_of(task) in results:
                        yield task, _restored(task, results[_id_of(task)])

    async def watch_progress(
        self, task: Task[Any], timeout: float | None
    ) -> AsyncGenerator[TaskProgress[Any], None]:
        """The progress of a task, whenever it has changed, until its result is there."""
        task_id = _id_of(task)
        column_id = self._config.to_column_task_id(task_id)
        limit = _TimeLimit(timeout)
        result = self._result_topic(column_id)
        topics = [result, Topic(self._config.progress_channel, str(column_id))]
        with self._waiting.subscribe(topics) as subscription:
            last = None
            is_over = await limit.of(self._operations.is_ready(column_id, task_id))
            while True:
                row = await limit.of(self._operations.read_progress(column_id, task_id))
                if row is not None and row != last:
                    yield self._codec.decode_progress(task_id, row)
                    last = row
                if is_over:
                    return
                woken = await limit.of_wait(subscription.woken())
                if result in woken:
                    # One that is deleted as it is read may be gone again.
                    is_over = not self._keep_results or await limit.of(
                        self._operations.is_ready(column_id, task_id)
                    )

    async def _become_ready(
        self, tasks: Sequence[Task[Any]], timeout: float | None
    ) -> AsyncIterator[list[list[Task[Any]]]]:
        """The tasks whose results are there, in parts as they come; those of one id together."""
        limit = _TimeLimit(timeout)
        missing: dict[Any, list[Task[Any]]] = {}
        for task in tasks:
            missing.setdefault(self._config.to_column_task_id(_id_of(task)), []).append(task)
        topics = {self._result_topic(column_id): column_id for column_id in missing}
        with self._waiting.subscribe(topics) as subscription:
            asked = set(missing)
            while missing:
                ready = await limit.of(self._operations.find_ready(asked)) if asked else set()
                if ready:
                    yield [missing.pop(column_id) for column_id in ready]
                if missing:
                    woken = await limit.of_wait(subscription.woken())
                    asked = {topics[topic] for topic in woken} & missing.keys()

    async def _get(self, column_id: Any, task_id: str, with_logs: bool) -> TaskiqResult[Any] | None:
        if self._keep_results:
            row = await self._operations.read(column_id, task_id)
            if row is None:
                return None
            return self._codec.decode_result(task_id, row, with_logs=with_logs)
        result = await self._operations.take(column_id, task_id)
        return result if result is None else _with_log(result, with_logs)

    async def _get_all(
        self, task_ids: Mapping[Any, str], with_logs: bool
    ) -> dict[Any, TaskiqResult[Any]]:
        if not task_ids:
            return {}
        if self._keep_results:
            return {
                column_id: self._codec.decode_result(task_ids[column_id], row, with_logs=with_logs)
                for column_id, row in (await self._operations.read_all(task_ids)).items()
            }
        results = await self._operations.take_all(task_ids)
        return {column_id: _with_log(result, with_logs) for column_id, result in results.items()}

    def _result_topic(self, column_id: Any) -> Topic:
        return Topic(self._config.results_channel, str(column_id))


class _TimeLimit:
    """Seconds in all for what is awaited one after the other.

    Not an asyncio.timeout() around it: in an asynchronous iterator that would also end what its
    user does between two steps.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        if seconds is not None and seconds >= 0:
            self._deadline = asyncio.get_running_loop().time() + seconds
        # Without any time at all it is still looked, until there would be something to wait for.
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


def _id_of(task: Task[Any]) -> str:
    return task if isinstance(task, str) else task.task_id


def _with_log(result: TaskiqResult[Any], with_logs: bool) -> TaskiqResult[Any]:
    if not with_logs:
        result.log = None
    return result


def _restored(task: Task[Any], result: TaskiqResult[Any]) -> TaskiqResult[Any]:
    """The result with the return type that the task declares, as its own get_result() has it."""
    return_type: Any = None if isinstance(task, str) else task.return_type
    if return_type is not None and not result.is_err:
        try:
            result.return_value = _adapter(return_type).validate_python(result.return_value)
        except ValueError:
            logger.warning("cannot make the result of task %s a %s", _id_of(task), return_type)
    return result


@lru_cache
def _adapter(return_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(return_type)
