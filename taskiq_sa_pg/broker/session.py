"""Sends a task in the application's transaction: it is committed or rolled back with it."""

import inspect
from collections.abc import AsyncGenerator, Coroutine
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar, overload

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from taskiq import AckableMessage, AsyncBroker, AsyncTaskiqTask, BrokerMessage, TaskiqMessage
from taskiq.abc.middleware import TaskiqMiddleware
from taskiq.decor import AsyncTaskiqDecoratedTask
from taskiq.kicker import AsyncKicker

from taskiq_sa_pg.broker.pending import OnCommit, call_at_commit
from taskiq_sa_pg.broker.sender import row_of
from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.statements import QueueRow, Upsert

AnySession: TypeAlias = (
    AsyncSession | Session | async_scoped_session[AsyncSession] | scoped_session[Session]
)

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")

# A task, or its kicker with labels, a task id, ...
_Task: TypeAlias = AsyncTaskiqDecoratedTask[_P, _R] | AsyncKicker[_P, _R]


# Private names of SQLAlchemy: the state of a session, the connections of its transaction, and the
# level of create_engine(isolation_level=...).
_CLOSE_STATE: Final = "_close_state"
_CONNECTIONS: Final = "_connections"
_ENGINE_WIDE: Final = "_on_connect_isolation_level"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """The transaction of a session, and how tasks are stored in it.

    Attributes:
        session: The session, or the AsyncSession's sync_session.
        awaited: The AsyncSession; None for a Session.
        settings: The broker's settings.
        enqueue: Stores a task; None only begins the transaction.
        on_commit: Called with the committed rows.
        outer: The application's connection, if the session is bound to one and tasks are stored.
    """

    session: Session
    awaited: AsyncSession | None
    settings: QueueSettings
    enqueue: Upsert | None
    on_commit: OnCommit
    outer: Connection | None

    async def send(self, row: QueueRow) -> None:
        """Stores a task; with a Session, without awaiting anything."""
        if self.awaited is None:
            self._store(self.session, row)
        else:
            await self.awaited.run_sync(self._store, row)
        call_at_commit(self.session, row, self.on_commit, self.outer)

    def _store(self, session: Session, row: QueueRow) -> None:
        chosen = {"mapper": self.settings.models.Queue}
        if self.enqueue is None:
            session.connection(bind_arguments=chosen)
        else:
            [(statement, parameters)] = self.enqueue.of([row])
            session.execute(statement, parameters, bind_arguments=chosen)


class SessionBroker(AsyncBroker):
    """Sends tasks in the transaction of a session; otherwise the same as its broker.

    SQLAlchemyBroker.in_session() returns it. A task is sent when the session commits. If the
    session is rolled back, also to a savepoint, the task is not sent. Statements are not retried:
    errors are raised as for any other statement of the session.
    """

    __slots__ = ("_transaction",)

    def __init__(self, broker: AsyncBroker, transaction: Transaction) -> None:
        self.__dict__ = vars(broker)
        self._transaction = transaction

    @property
    def middlewares(self) -> list[TaskiqMiddleware]:  # type: ignore[override]  # a list in the base class
        """The broker's middlewares, adapted to a transaction."""
        return list(map(_InTransaction, vars(self)["middlewares"]))

    @overload
    async def kiq(
        self, task: _Task[_P, Coroutine[Any, Any, _T]], *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncTaskiqTask[_T]: ...

    @overload
    async def kiq(
        self, task: _Task[_P, _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncTaskiqTask[_R]: ...

    async def kiq(self, task: _Task[_P, Any], *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Sends a task in the transaction of an AsyncSession.

        Args:
            task: The task, or its kicker: `my_task.kicker().with_labels(...)`.
            *args: The task's arguments.
            **kwargs: The task's arguments.

        Raises:
            ConfigurationError: The session is a Session: use kiq_sync().
            SendTaskError: The session could not store the task; the reason is its `__cause__`.
        """
        if self._transaction.awaited is None:
            raise ConfigurationError("kiq() is for an AsyncSession: with a Session, use kiq_sync()")
        return await self._kicker_of(task).kiq(*args, **kwargs)

    @overload
    def kiq_sync(
        self, task: _Task[_P, Coroutine[Any, Any, _T]], *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncTaskiqTask[_T]: ...

    @overload
    def kiq_sync(
        self, task: _Task[_P, _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> AsyncTaskiqTask[_R]: ...

    def kiq_sync(self, task: _Task[_P, Any], *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Sends a task in the transaction of a Session; needs no event loop.

        The arguments are those of kiq().

        Raises:
            ConfigurationError: The session is an AsyncSession, or a middleware has to be awaited.
            SendTaskError: As for kiq().
        """
        if self._transaction.awaited is not None:
            raise ConfigurationError("kiq_sync() is for a Session: with an AsyncSession, use kiq()")
        for middleware in vars(self)["middlewares"]:
            _refuse_async(middleware)
        sending = self._kicker_of(task).kiq(*args, **kwargs)
        try:
            sending.send(None)
        except StopIteration as done:
            return done.value
        sending.close()
        raise ConfigurationError("kiq_sync() does not support a middleware that awaits something")

    async def kick(self, message: BrokerMessage) -> None:
        """Stores a message in the transaction; taskiq's kicker calls it."""
        await self._transaction.send(row_of(self._transaction.settings, message))

    def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Not supported in a session.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("a worker listens to the broker itself, not to one in a session")

    def _kicker_of(self, task: _Task[_P, _R]) -> AsyncKicker[_P, _R]:
        kicker = copy(task) if isinstance(task, AsyncKicker) else task.kicker()
        return kicker.with_broker(self)


def join(
    session: AnySession,
    settings: QueueSettings,
    database: Database | None,
    enqueue: Upsert | None,
    on_commit: OnCommit,
) -> Transaction:
    """The transaction of a session, after checking that it can store tasks.

    Args:
        session: The session.
        settings: The broker's settings.
        database: The database that the session must have; None allows any.
        enqueue: Stores a task; None stores none.
        on_commit: Called with the committed rows.

    Raises:
        ConfigurationError: The session cannot store tasks.
    """
    if isinstance(session, scoped_session | async_scoped_session):
        session = session()
    if not isinstance(session, AsyncSession | Session):
        raise ConfigurationError(
            f"in_session() takes a Session or an AsyncSession, not {_named(session)}"
        )
    awaited = session if isinstance(session, AsyncSession) else None
    sync_session = session.sync_session if isinstance(session, AsyncSession) else session
    _check_open(sync_session)
    try:
        bind = sync_session.get_bind(mapper=settings.models.Queue)
    except UnboundExecutionError as exc:
        raise ConfigurationError(
            f"the session has no engine for {settings.table}: create it with sessionmaker(engine), "
            "or add the model of the queue to its binds="
        ) from exc
    if database is not None:
        _check_place(bind, settings, database)
    _check_level(sync_session, bind)
    return Transaction(
        session=sync_session,
        awaited=awaited,
        settings=settings,
        enqueue=enqueue,
        on_commit=on_commit,
        outer=bind if isinstance(bind, Connection) and enqueue is not None else None,
    )


def _named(value: object) -> str:
    return value.__qualname__ if isinstance(value, type) else type(value).__qualname__


def _check_open(session: Session) -> None:
    if session.in_transaction():
        return
    state = getattr(session, _CLOSE_STATE, None)  # after close(), most sessions can be used again
    if getattr(state, "name", None) == "CLOSED":
        raise ConfigurationError("the session is closed: send the task before you close it")
    if not session.autobegin:
        raise ConfigurationError(
            "the session has autobegin=False and no transaction: call begin() first"
        )


def _check_place(bind: Engine | Connection, settings: QueueSettings, database: Database) -> None:
    if bind.dialect.name != "postgresql" or not database.may_be_of(bind.engine):
        url = bind.engine.url
        # Any other parameter may be a secret.
        query = {name: value for name, value in url.query.items() if name in {"host", "port"}}
        raise ConfigurationError(
            f"the session is connected to {url.set(query=query)!r}, but table {settings.table} of "
            "the broker is in another database, so no worker would find the task. Use the same "
            "address for both, or pass an AsyncSession's engine: SQLAlchemyBroker(engine=...)"
        )


def _check_level(session: Session, bind: Engine | Connection) -> None:
    begun = getattr(session.get_transaction(), _CONNECTIONS, {}).get(bind, [bind])[0]
    engine_wide = getattr(bind.dialect, _ENGINE_WIDE, None)
    level = begun.get_execution_options().get("isolation_level", engine_wide)
    if str(level).upper() == "AUTOCOMMIT":
        raise ConfigurationError(
            "the session is in AUTOCOMMIT, so it has no transaction to send the task in: use the "
            "task's own kiq(), or a session with transactions"
        )


class _InTransaction(TaskiqMiddleware):
    """Calls a middleware for a task that is sent in a transaction.

    A middleware that stores something itself would do so even if the transaction is rolled back. It
    can define `pre_send_in_session(message)`, which is not awaited, instead of `pre_send(message)`.
    """

    def __init__(self, middleware: TaskiqMiddleware) -> None:
        super().__init__()
        self._middleware = middleware

    def pre_send(self, message: TaskiqMessage) -> Any:
        hook = getattr(self._middleware, "pre_send_in_session", self._middleware.pre_send)
        return hook(message)

    def post_send(self, message: TaskiqMessage) -> Any:
        return self._middleware.post_send(message)


def _refuse_async(middleware: TaskiqMiddleware) -> None:
    remedies = {
        "pre_send": ", or add a method pre_send_in_session(message) to the middleware",
        "post_send": "",
    }
    if hasattr(middleware, "pre_send_in_session"):
        del remedies["pre_send"]
    for name, remedy in remedies.items():
        if inspect.iscoroutinefunction(getattr(middleware, name)):
            raise ConfigurationError(
                f"kiq_sync() cannot await {type(middleware).__qualname__}.{name}(): make it a "
                f"synchronous method{remedy}"
            )
