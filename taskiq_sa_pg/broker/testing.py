"""A broker for the tests of applications: it runs tasks in the same process, after the commit."""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only
from taskiq import BrokerMessage, InMemoryBroker
from taskiq.exceptions import UnknownTaskError

from taskiq_sa_pg.broker.sender import row_of
from taskiq_sa_pg.broker.session import AnySession, SessionBroker, join
from taskiq_sa_pg.broker.settings import QueueSettings, check_queue_names
from taskiq_sa_pg.database import Database, DsnSource
from taskiq_sa_pg.models import (
    DEFAULT_QUEUE,
    Models,
    TableConfig,
    TaskIdField,
    choose_models,
)
from taskiq_sa_pg.statements import QueueRow


class InProcessBroker(InMemoryBroker):
    """Runs tasks in the process that sends them, as taskiq's InMemoryBroker does; for tests.

    It replaces a SQLAlchemyBroker. A task that is sent in a session runs once after the commit, and
    never if the session is rolled back. It needs no table. It refuses the labels, task ids and
    sessions that a SQLAlchemyBroker refuses. `delay` and `priority` are ignored: every task runs at
    once.

    A commit in any thread starts its tasks on the event loop on which the broker was started or
    last used. If there is none, wait_all() starts them.

    Args:
        dsn: Address of the database that sessions must have; None allows any.
        engine: The same, as an AsyncEngine.
        models: The models of the broker that it replaces, if you pass them there.
        field_for_task_id: Type of the task-id column.
        queue_name: The queue of tasks without a label `queue_name`.
        await_inplace: Whether kiq(), or the commit, returns after the task has ended. A Session
            that is committed on the event loop cannot wait: then the task is only started.
        **in_memory: Passed to taskiq's InMemoryBroker.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        dsn: DsnSource | None = None,
        *,
        engine: AsyncEngine | None = None,
        models: Models | None = None,
        field_for_task_id: TaskIdField = "VarChar",
        queue_name: str = DEFAULT_QUEUE,
        await_inplace: bool = False,
        **in_memory: Any,
    ) -> None:
        super().__init__(await_inplace=await_inplace, **in_memory)
        config = TableConfig(field_for_task_id=field_for_task_id)
        self.models = models = choose_models(models, config, queue=True)
        self.settings: Final = QueueSettings(models=models, queue_name=queue_name)
        has_place = dsn is not None or engine is not None
        self._database = Database(dsn, engine=engine) if has_place else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._committed: deque[QueueRow] = deque()  # not started yet
        self._running: set[asyncio.Task[Any]] = set()

    async def startup(self) -> None:
        """Starts it on this event loop, as InMemoryBroker does."""
        self._note_loop()
        await super().startup()

    async def kick(self, message: BrokerMessage) -> None:
        """Runs a task; taskiq's kicker calls it.

        Raises:
            ConfigurationError: A label is invalid.
            InvalidTaskIdError: The task-id column cannot hold the id.
            UnknownTaskError: The task does not exist.
        """
        self._note_loop()
        if self.find_task(message.task_name) is None:
            raise UnknownTaskError(task_name=message.task_name)
        row = row_of(self.settings, message)
        if self.await_inplace:
            await self.receiver.callback(row.message)
        else:
            self._start(row)

    def in_session(self, session: AnySession) -> SessionBroker:
        """Sends tasks in the transaction of a session: they run after its commit, or never.

        As SQLAlchemyBroker.in_session(). If the session is bound to a connection that the test
        rolls back later, its tasks run after the session's commit().

        Args:
            session: A session, sync or async.

        Raises:
            ConfigurationError: The session is in AUTOCOMMIT or closed, or it has another database
                than the broker's dsn or engine.
        """
        self._note_loop()
        transaction = join(session, self.settings, self._database, None, self._run_committed)
        return _InProcessSession(self, transaction)

    @contextmanager
    def checking(self, dsn: DsnSource) -> Iterator[None]:
        """Compares sessions with another database for a while; for the pytest plugin."""
        before = self._database
        if before is not None:
            self._database = Database(dsn)
        try:
            yield
        finally:
            self._database = before

    def listening_to(self, *queue_names: str) -> "InProcessBroker":
        """The broker itself: it runs the tasks of all queues.

        Args:
            *queue_names: The queues.

        Raises:
            ConfigurationError: No name, or an invalid one.
        """
        check_queue_names(queue_names)
        return self

    async def wait_all(self) -> None:
        """Returns when all sent and committed tasks have run, including those that they sent."""
        self._note_loop()
        self._start_committed()
        while self._running:
            await asyncio.wait(self._running)
            self._start_committed()

    def _note_loop(self) -> None:
        loop = _running_loop()
        if loop is not None:
            self._loop = loop

    def _run_committed(self, rows: list[QueueRow]) -> None:
        """Runs committed tasks; called in the thread of the commit."""
        # As in the queue, a waiting task is not replaced by one of the same id.
        first: dict[Any, QueueRow] = {}
        for row in rows:
            first.setdefault(row.task_id, row)
        self._committed.extend(first.values())
        here, loop = _running_loop(), self._loop
        if here is not None:
            self._run_here()
        elif loop is not None and loop.is_running():
            if self.await_inplace:
                asyncio.run_coroutine_threadsafe(self._run_all(), loop).result()
            else:
                loop.call_soon_threadsafe(self._start_committed)
        elif self.await_inplace:
            asyncio.run(self._run_all())

    def _run_here(self) -> None:
        if self.await_inplace:
            try:
                await_only(self._run_all())
            except MissingGreenlet:  # in a Session, nothing can be awaited
                self._start_committed()
        else:
            self._start_committed()

    async def _run_all(self) -> None:
        while self._committed:
            await self.receiver.callback(self._committed.popleft().message)

    def _start_committed(self) -> None:
        while self._committed:
            self._start(self._committed.popleft())

    def _start(self, row: QueueRow) -> None:
        task = asyncio.create_task(self.receiver.callback(row.message))
        self._running.add(task)
        task.add_done_callback(self._running.discard)


class _InProcessSession(SessionBroker):
    """Refuses an unknown task when it is sent, because the commit could not raise the error."""

    __slots__ = ()

    async def kick(self, message: BrokerMessage) -> None:
        if self.find_task(message.task_name) is None:
            raise UnknownTaskError(task_name=message.task_name)
        await super().kick(message)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
