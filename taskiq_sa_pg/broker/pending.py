"""Tasks that were sent in the transactions of a session, until these end."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Final, NamedTuple, TypeAlias

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from taskiq_sa_pg.statements import QueueRow

OnCommit: TypeAlias = Callable[[list[QueueRow]], None]

_PENDING: Final = "taskiq_sa_pg_pending"


class _Sent(NamedTuple):
    row: QueueRow
    on_commit: OnCommit
    outer: Connection | None


@dataclass(slots=True)
class _Pending:
    """In Session.info: the tasks sent, by transaction or savepoint."""

    sent: defaultdict[SessionTransaction, list[_Sent]] = field(
        default_factory=lambda: defaultdict(list)
    )
    committed: SessionTransaction | None = None  # the last one


def call_at_commit(
    session: Session, row: QueueRow, on_commit: OnCommit, outer: Connection | None = None
) -> None:
    """Calls `on_commit` with the rows that were sent, after their transaction is committed.

    The call is made when the connection is free again, in the thread of the commit. Rows of a
    savepoint are passed when all is committed; rolled-back rows are not passed.

    Args:
        session: The session.
        row: The row that was sent.
        on_commit: Called with the rows of a transaction.
        outer: A connection of the application. If it is still in a transaction after the session's
            commit, `on_commit` is not called: SQLAlchemy has no event for the end of that one.
    """
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        return
    _listen()
    pending = session.info.setdefault(_PENDING, _Pending())
    pending.sent[transaction].append(_Sent(row, on_commit, outer))


@cache
def _listen() -> None:
    # Once for all sessions: to listen to each takes as long as the statement that stores a task.
    event.listen(Session, "after_commit", _note_commit)
    event.listen(Session, "after_transaction_end", _note_end)


def _note_commit(session: Session) -> None:
    pending: _Pending | None = session.info.get(_PENDING)
    if pending is not None:
        pending.committed = session.get_nested_transaction() or session.get_transaction()


def _note_end(session: Session, transaction: SessionTransaction) -> None:
    # Called however it ends; for close(), SQLAlchemy has no other event.
    pending: _Pending | None = session.info.get(_PENDING)
    if pending is None:
        return
    sent = pending.sent.pop(transaction, [])
    if pending.committed is transaction:
        pending.committed = None
        if transaction.parent is not None:
            pending.sent[transaction.parent] += sent
        else:
            _call(sent)


def _call(sent: list[_Sent]) -> None:
    rows: defaultdict[OnCommit, list[QueueRow]] = defaultdict(list)
    for row, on_commit, outer in sent:
        if outer is None or not outer.in_transaction():
            rows[on_commit].append(row)
    for on_commit, committed in rows.items():
        on_commit(committed)
