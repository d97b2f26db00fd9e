"""What was sent in the transactions of a session, until they end."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Final, NamedTuple, TypeAlias

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from taskiq_sa_pg.statements import QueueRow

Tell: TypeAlias = Callable[[list[QueueRow]], None]

_PENDING: Final = "taskiq_sa_pg_pending"


class _Sent(NamedTuple):
    row: QueueRow
    tell: Tell
    outer: Connection | None


@dataclass(slots=True)
class _Pending:
    """In Session.info: what was sent, by the transaction or savepoint in which it was."""

    sent: defaultdict[SessionTransaction, list[_Sent]] = field(
        default_factory=lambda: defaultdict(list)
    )
    committed: SessionTransaction | None = None  # the last one


def tell_at_commit(
    session: Session, row: QueueRow, tell: Tell, outer: Connection | None = None
) -> None:
    """Has `tell` called with the rows that were sent, once their transaction is committed.

    That is when its connection is free again, in the thread of the commit. Of what was rolled back
    nothing is told, and of a savepoint when all is committed.

    Args:
        session: The session.
        row: What was sent.
        tell: Called with the rows of a transaction.
        outer: A connection of the application's own. Where it is still in a transaction after the
            session's commit, nothing is told: SQLAlchemy does not tell how that one ends.
    """
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        return
    _listen()
    pending = session.info.setdefault(_PENDING, _Pending())
    pending.sent[transaction].append(_Sent(row, tell, outer))


@cache
def _listen() -> None:
    # To all sessions, once: to listen to each takes as long as the statement that stores a task.
    event.listen(Session, "after_commit", _note_commit)
    event.listen(Session, "after_transaction_end", _note_end)


def _note_commit(session: Session) -> None:
    pending: _Pending | None = session.info.get(_PENDING)
    if pending is not None:
        pending.committed = session.get_nested_transaction() or session.get_transaction()


def _note_end(session: Session, transaction: SessionTransaction) -> None:
    # Whatever ends it: of close(), SQLAlchemy tells nothing else.
    pending: _Pending | None = session.info.get(_PENDING)
    if pending is None:
        return
    sent = pending.sent.pop(transaction, [])
    if pending.committed is transaction:
        pending.committed = None
        if transaction.parent is not None:
            pending.sent[transaction.parent] += sent
        else:
            _tell(sent)


def _tell(sent: list[_Sent]) -> None:
    rows: defaultdict[Tell, list[QueueRow]] = defaultdict(list)
    for row, tell, outer in sent:
        if outer is None or not outer.in_transaction():
            rows[tell].append(row)
    for tell, told in rows.items():
        tell(told)
