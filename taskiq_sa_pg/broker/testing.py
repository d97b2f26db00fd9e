"""A broker for the tests of applications: it runs tasks in the process, after their commit."""

import asyncio
from collections import deque
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
from taskiq_sa_pg.models import DEFAULT_QUEUE, Models, TaskIdField, build_models
from taskiq_sa_pg.statements import QueueRow


class InProcessBroker(InMemoryBroker):
    """Runs tasks in the process that sends them, as taskiq's InMemoryBroker does; for tests.

    In place of a SQLAlchemyBroker: what is sent in a session runs after its commit, once, and never
    if it is rolled back. It needs no table. It refuses the labels, task ids and sessions that a
    SQLAlchemyBroker refuses. `delay` and `priority` change nothing: every task runs at once.

    A commit starts its tasks on the event loop that the broker was started on or used last, from
    whatever thread. Where there is none, they are started by wait_all().

    Args:
        dsn: Address of the database that sessions have to be of; None takes any.
        engine: The same as an engine.
        models: Those of the broker that it stands for, if that is given any.
        field_for_task_id: Type of the task-id column.
        queue_name: The queue that tasks without a label `queue_name` go to.
        await_inplace: Whether a task has ended when kiq() returns, or the commit. Where a commit
            cannot wait, because a Session is committed on the event loop, it is only started.
        **in_memory: Passed on to taskiq's InMemoryBroker.

    Raises:
        ConfigurationError: An argument that cannot work.
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
        models = models or build_models(field_for_task_id=field_for_task_id, queue=True)
        self.models = models
        self.settings: Final = QueueSettings(models=models, queue_name=queue_name)
        has_place = dsn is not None or engine is not None
        self._database = Database(dsn, engine=engine) if has_place else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._committed: deque[QueueRow] = deque()  # and not yet started
        self._running: set[asyncio.Task[Any]] = set()

    async def startup(self) -> None:
        """Starts it on this event loop, as InMemoryBroker does."""
        self._note_loop()
        await super().startup()

    async def kick(self, message: BrokerMessage) -> None:
        """Runs a task; taskiq's kicker calls it.

        Raises:
            ConfigurationError: A label that cannot work.
            InvalidTaskIdError: The task-id column could not hold the id.
            UnknownTaskError: There is no such task.
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

        As SQLAlchemyBroker.in_session(). Of a session on a connection that the test itself will
        roll back, the session's own commit() counts.

        Args:
            session: A session, sync or async.

        Raises:
            ConfigurationError: One in AUTOCOMMIT, a closed one, or one of another database, where
                the broker knows its own.
        """
        self._note_loop()
        transaction = join(session, self.settings, self._database, None, self._run_committed)
        return _InProcessSession(self, transaction)

    def listening_to(self, *queue_names: str) -> "InProcessBroker":
        """The broker itself: it runs the tasks of all queues.

        Args:
            *queue_names: What a worker would listen to.

        Raises:
            ConfigurationError: No name, or what is none.
        """
        check_queue_names(queue_names)
        return self

    async def wait_all(self) -> None:
        """Returns when all that was sent and committed has run, and what that has sent."""
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
        """Runs what is committed, from the thread of the commit."""
        # One that waits already stays as it is.
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
            except MissingGreenlet:  # a Session, of which nothing can be awaited
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
    """Refuses a task that nobody could run, because it is too late for that at the commit."""

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
