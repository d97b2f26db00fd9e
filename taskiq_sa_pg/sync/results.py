"""SyncResults: the methods of a result backend, for threads without an event loop."""

from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
)
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, TypeAlias, TypeVar, overload
from uuid import UUID
from weakref import finalize

from taskiq import AsyncBroker, AsyncTaskiqTask, TaskiqResult
from taskiq.decor import AsyncTaskiqDecoratedTask
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.kicker import AsyncKicker

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.codec import Seconds
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.results import DEFAULT_LIMIT, Outcome, Page, TaskDetails, TaskStatus, Where
from taskiq_sa_pg.sync.portal import Portal, Portals, Steps, refuse_event_loop

_ReturnType = TypeVar("_ReturnType")
_T = TypeVar("_T")
_Id = TypeVar("_Id", bound=str | UUID)
_P = ParamSpec("_P")
_R = TypeVar("_R")

_Sent: TypeAlias = AsyncTaskiqTask[_T] | str | UUID
_Sendable: TypeAlias = AsyncTaskiqDecoratedTask[_P, _R] | AsyncKicker[_P, _R]

# As long as a program that forgot close() may need to end.
_SECONDS_AT_EXIT: Final = 5.0


class SyncResults(Generic[_ReturnType]):
    """A broker and its result backend for code without an event loop: Flask, Django, scripts.

        results = SyncResults(broker)
        task = results.kiq(add, 2, 3)
        print(results.wait_result(task, timeout=10).return_value)

    The backend runs on an event loop in a background thread, which the first call starts. All
    threads of the process share that thread, its connections and its one listening connection.
    After a fork, the child's first call starts a thread and connections for the child.

    Each method has the name, the arguments, the return value and the errors of the method of
    SQLAlchemyResultBackend, and blocks until it has the answer. The first call also raises what
    `startup()` raises. Ctrl-C (KeyboardInterrupt) ends a call and cancels it. A call in a thread
    that runs an event loop raises ConfigurationError, because it would block that event loop. A
    call that close() interrupts raises NotStartedError.

    Use it as a context manager, or call close(), to end the thread. If a program does neither, the
    thread ends with the program.

    Args:
        source: Your broker, whose result backend must be a SQLAlchemyResultBackend; or the result
            backend alone, if you send no tasks. SyncResults starts it and shuts it down. Do not
            start it yourself: a backend works on one event loop at a time.

    Raises:
        ConfigurationError: source is something else, or the broker has another result backend.
    """

    @overload
    def __init__(
        self: "SyncResults[_ReturnType]", source: SQLAlchemyResultBackend[_ReturnType]
    ) -> None: ...
    @overload
    def __init__(self: "SyncResults[Any]", source: AsyncBroker) -> None: ...
    def __init__(self, source: SQLAlchemyResultBackend[Any] | AsyncBroker) -> None:
        backend: object = source.result_backend if isinstance(source, AsyncBroker) else source
        if not isinstance(backend, SQLAlchemyResultBackend):
            raise ConfigurationError(
                "SyncResults takes a SQLAlchemyResultBackend, or a broker with one, not "
                f"{source!r}: call broker.with_result_backend(...) first"
            )
        self._backend: SQLAlchemyResultBackend[Any] = backend
        self._broker = source if isinstance(source, AsyncBroker) else None
        self._portals = Portals(_Lifespan(backend, self._broker))
        # At exit, and when nobody refers to this any more.
        finalize(self, self._portals.close_at_exit, _SECONDS_AT_EXIT)

    def __enter__(self) -> "SyncResults[_ReturnType]":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Shuts the backend down and ends the thread. A later call starts both again."""
        self._portals.close()

    @overload
    def kiq(
        self, task: _Sendable[_P, Coroutine[Any, Any, _T]], *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncTaskiqTask[_T]: ...
    @overload
    def kiq(
        self, task: _Sendable[_P, _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncTaskiqTask[_R]: ...
    def kiq(self, task: _Sendable[_P, Any], *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Sends a task through the broker, as `await task.kiq(...)` does.

        In the transaction of a synchronous Session, send it with
        `broker.in_session(session).kiq_sync()` instead.

        Args:
            task: The task, or its kicker: `my_task.kicker().with_labels(...)`.
            *args: The task's arguments.
            **kwargs: The task's arguments.

        Returns:
            The object that `await task.kiq()` returns. Pass it to wait_result(), or store its
            `task_id`. Its own methods are asynchronous.

        Raises:
            ConfigurationError: SyncResults was created from a result backend.
            SendTaskError: The broker could not send it; the reason is its `__cause__`.
        """
        if self._broker is None:
            raise ConfigurationError("kiq() needs a broker: use SyncResults(broker)")
        kicker = copy(task) if isinstance(task, AsyncKicker) else task.kicker()
        return self._call("kiq", kicker.with_broker(self._broker).kiq, *args, **kwargs)

    @overload
    def get_result(
        self, task_id: str | UUID, with_logs: bool = ..., *, return_type: None = ...
    ) -> TaskiqResult[_ReturnType]: ...
    @overload
    def get_result(
        self, task_id: str | UUID, with_logs: bool = ..., *, return_type: type[_T]
    ) -> TaskiqResult[_T]: ...
    @overload
    def get_result(
        self, task_id: str | UUID, with_logs: bool = ..., *, return_type: Any
    ) -> TaskiqResult[Any]: ...
    def get_result(
        self, task_id: str | UUID, with_logs: bool = False, *, return_type: Any = None
    ) -> TaskiqResult[Any]:
        """Returns a task's result; raises ResultIsMissingError if it has none."""
        get = partial(self._backend.get_result, return_type=return_type)
        return self._call("get_result", get, task_id, with_logs)

    def get_results(
        self, task_ids: Iterable[_Id], with_logs: bool = False
    ) -> dict[_Id, TaskiqResult[_ReturnType]]:
        """Returns the available results by task id."""
        return self._call("get_results", self._backend.get_results, _listed(task_ids), with_logs)

    def is_result_ready(self, task_id: str | UUID) -> bool:
        """Whether the task has a result."""
        return self._call("is_result_ready", self._backend.is_result_ready, task_id)

    @overload
    def wait_result(
        self, task: AsyncTaskiqTask[_T], timeout: float | None = ..., with_logs: bool = ...
    ) -> TaskiqResult[_T]: ...
    @overload
    def wait_result(
        self, task: str | UUID, timeout: float | None = ..., with_logs: bool = ...
    ) -> TaskiqResult[_ReturnType]: ...
    def wait_result(
        self, task: _Sent[Any], timeout: float | None = None, with_logs: bool = False
    ) -> TaskiqResult[Any]:
        """Waits for a task's result; raises TaskiqResultTimeoutError after the timeout."""
        wait: Any = self._backend.wait_result
        result: TaskiqResult[Any] = self._call("wait_result", wait, task, timeout, with_logs)
        return result

    @overload
    def wait_results(
        self,
        tasks: Iterable[AsyncTaskiqTask[_T]],
        timeout: float | None = ...,
        with_logs: bool = ...,
    ) -> list[TaskiqResult[_T]]: ...
    @overload
    def wait_results(
        self, tasks: Iterable[str | UUID], timeout: float | None = ..., with_logs: bool = ...
    ) -> list[TaskiqResult[_ReturnType]]: ...
    @overload
    def wait_results(
        self, tasks: Iterable[_Sent[Any]], timeout: float | None = ..., with_logs: bool = ...
    ) -> list[TaskiqResult[Any]]: ...
    def wait_results(
        self, tasks: Iterable[_Sent[Any]], timeout: float | None = None, with_logs: bool = False
    ) -> list[TaskiqResult[Any]]:
        """Waits for the results of several tasks, and returns them in the order of the tasks."""
        tasks = _listed(tasks)
        return self._call("wait_results", self._backend.wait_results, tasks, timeout, with_logs)

    @overload
    def as_completed(
        self,
        tasks: Iterable[AsyncTaskiqTask[_T]],
        timeout: float | None = ...,
        with_logs: bool = ...,
    ) -> Generator[tuple[AsyncTaskiqTask[_T], TaskiqResult[_T]], None, None]: ...
    @overload
    def as_completed(
        self, tasks: Iterable[_Id], timeout: float | None = ..., with_logs: bool = ...
    ) -> Generator[tuple[_Id, TaskiqResult[_ReturnType]], None, None]: ...
    @overload
    def as_completed(
        self, tasks: Iterable[_Sent[Any]], timeout: float | None = ..., with_logs: bool = ...
    ) -> Generator[tuple[_Sent[Any], TaskiqResult[Any]], None, None]: ...
    def as_completed(
        self, tasks: Iterable[_Sent[Any]], timeout: float | None = None, with_logs: bool = False
    ) -> Generator[tuple[Any, TaskiqResult[Any]], None, None]:
        """Iterates over several tasks with their results, in the order of completion.

            for task, result in results.as_completed(tasks): ...

        The arguments are those of SQLAlchemyResultBackend.as_completed().
        """
        make = partial(self._backend.as_completed, _listed(tasks), timeout, with_logs)
        return self._iterate("as_completed", make)

    def get_progress(self, task_id: str | UUID) -> TaskProgress[Any] | None:
        """Returns the latest progress; None if there is none."""
        return self._call("get_progress", self._backend.get_progress, task_id)

    def watch_progress(
        self, task: _Sent[Any], timeout: float | None = None
    ) -> Generator[TaskProgress[Any], None, None]:
        """Iterates over a task's progress, each time it changes, until its result is stored.

            for progress in results.watch_progress(task): ...

        The arguments are those of SQLAlchemyResultBackend.watch_progress().
        """
        make = partial(self._backend.watch_progress, task, timeout)
        return self._iterate("watch_progress", make)

    def get_status(self, task_id: str | UUID) -> TaskStatus:
        """Returns a task's status: "queued", "started", "succeeded" and so on."""
        return self._call("get_status", self._backend.get_status, task_id)

    def find(
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
        """Returns a page of finished tasks, latest first."""
        find = partial(
            self._backend.find,
            window=window,
            outcome=outcome,
            name=name,
            worker=worker,
            label=label,
            argument=argument,
            after=after,
            limit=limit,
        )
        return self._call("find", find, where)

    def get_details(self, task_id: str | UUID, *, with_result: bool = False) -> TaskDetails:
        """Returns everything that is stored for a finished task."""
        get = partial(self._backend.get_details, with_result=with_result)
        return self._call("get_details", get, task_id)

    def forget(self, task_ids: Iterable[str | UUID]) -> int:
        """Deletes results, progress and status of tasks; returns the number of results."""
        return self._call("forget", self._backend.forget, _listed(task_ids))

    def call(
        self, function: Callable[_P, Awaitable[_T]], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Calls another async method of the backend or the broker, and returns what it returns.

            results.call(backend.prune, limit=1_000)
            results.call(broker.get_queues)

        Args:
            function: The method, or another async function.
            *args: Its arguments.
            **kwargs: Its arguments.
        """
        return self._call("call", function, *args, **kwargs)

    def _call(
        self,
        name: str,
        function: Callable[_P, Awaitable[_T]],
        /,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        refuse_event_loop(name)
        return self._portals.get().call(partial(function, *args, **kwargs))

    def _iterate(
        self, name: str, make: Callable[[], AsyncGenerator[_T, None]]
    ) -> Generator[_T, None, None]:
        async def begin() -> Steps[_T]:
            return Steps(make())

        refuse_event_loop(name)
        portal = self._portals.get()
        steps = portal.call(begin)  # which checks the arguments, before the first step

        def iterate() -> Generator[_T, None, None]:
            try:
                while values := self._step(name, portal, steps):
                    yield from values
            finally:
                portal.close_steps(steps)

        return iterate()

    def _step(self, name: str, portal: Portal, steps: Steps[_T]) -> tuple[_T, ...]:
        refuse_event_loop(name)
        return portal.call(steps.next)


@dataclass(frozen=True, slots=True)
class _Lifespan:
    """Starts and ends a result backend, with its broker."""

    backend: SQLAlchemyResultBackend[Any]
    broker: AsyncBroker | None

    async def startup(self) -> None:
        try:
            if self.broker is not None:
                await self.broker.startup()
            if not self._is_ours:
                await self.backend.startup()
        except BaseException:
            await self._end_backend()
            raise

    async def shutdown(self) -> None:
        try:
            if self.broker is not None:
                await self.broker.shutdown()
        finally:
            await self._end_backend()

    @property
    def _is_ours(self) -> bool:
        # It may be started on another event loop: then that is the error, and it goes on there.
        return self.backend.database.is_open

    async def _end_backend(self) -> None:
        # Where the broker has not done it, as InMemoryBroker before taskiq 0.13.
        if self._is_ours:
            await self.backend.shutdown()


def _listed(tasks: Iterable[_T]) -> Iterable[_T]:
    # Here, because on the event loop a generator could not call kiq(), nor Django read a QuerySet.
    if not isinstance(tasks, str):  # which the backend refuses
        tasks = list(tasks)
    return tasks
