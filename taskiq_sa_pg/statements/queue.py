"""The broker's queue: statements to send tasks, and to claim, renew, release, park and acknowledge.

A worker may change a row only while it holds the claim: the number in `claim`, which increases
whenever the task is claimed or sent again. Claims are passed as two arrays, `given_task_id` and
`given_claim`.
"""

from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    DateTime,
    Double,
    Executable,
    FromClause,
    Insert,
    Integer,
    Select,
    SmallInteger,
    Table,
    Text,
    any_,
    bindparam,
    case,
    cast,
    delete,
    extract,
    false,
    func,
    literal_column,
    null,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert

from taskiq_sa_pg.models import as_interval
from taskiq_sa_pg.statements.rows import Claimed, QueueRow
from taskiq_sa_pg.statements.shapes import Inserted, Upsert, unnested

MAX_PRIORITY: Final = 9

_GIVEN: Final = "given_"  # prefix of parameters, whose names must differ from those of columns
_ZERO: Final = literal_column("0", Integer)
_ONE: Final = literal_column("1", Integer)
NEVER: Final = literal_column("'infinity'::timestamptz", DateTime(timezone=True))


def enqueue_tasks(queue: Table) -> Upsert:
    """Stores tasks that are sent.

    If a worker has claimed a task of the same id, the new message replaces the old one, which can
    no longer be acknowledged; retry middlewares send tasks so. A waiting task is kept.
    """

    def finish(statement: PostgresInsert, _: Inserted) -> Insert:
        return replacing_claimed(queue, statement)

    return Upsert(queue, QueueRow._fields, finish)


def replacing_claimed(queue: Table, statement: PostgresInsert) -> PostgresInsert:
    """Completes an INSERT of tasks: replaces a claimed task of the same id, keeps a waiting one."""
    overwritten = (*QueueRow._fields[1:], "queued_at")
    values: dict[str, Any] = {name: statement.excluded[name] for name in overwritten}
    # No parameters: after an INSERT ... SELECT, Citus does not know their types.
    values |= {"claim": queue.c.claim + _ONE, "deliveries": _ZERO, "worker": null()}
    return statement.on_conflict_do_update(
        index_elements=["task_id"], set_=values, where=queue.c.worker.is_not(None)
    )


def claim_tasks(queue: Table) -> Executable:
    """Claims at most `size` due tasks for `given_worker`, for `lease` seconds; returns Claimed.

    The arrays `given_queue_name` and `given_priority` are pairs, served in this order; within a
    pair, the task that is due the longest comes first. Tasks named in `given_unknown` are skipped,
    and so are tasks that another worker is claiming (SKIP LOCKED).
    """
    pairs = unnested([queue.c.queue_name, queue.c.priority], _GIVEN)
    size = bindparam("size", type_=Integer)
    due = (
        select(queue.c.task_id)
        .where(*_is_of(queue, pairs), queue.c.available_at <= func.now(), _is_known(queue))
        .order_by(queue.c.available_at)
        .limit(size)
        .with_for_update(of=queue, skip_locked=True)
        .lateral("due")
    )
    found = select(due.c.task_id).select_from(pairs.join(due, true())).limit(size).cte("found")
    return (
        update(queue)
        .where(is_any_of(queue, found))
        .values(
            available_at=_from_now("lease"),
            claim=queue.c.claim + 1,
            deliveries=queue.c.deliveries + 1,
            worker=bindparam(f"{_GIVEN}worker", type_=Text),
        )
        .returning(*[queue.c[name] for name in Claimed._fields])
    )


def select_next_due(queue: Table) -> Select[Any]:
    """Seconds until the next task is due, among those for claim_tasks(); None if there is none."""
    pairs = unnested([queue.c.queue_name, queue.c.priority], _GIVEN)
    first = (
        select(queue.c.available_at)
        .where(*_is_of(queue, pairs), queue.c.available_at < NEVER, _is_known(queue))
        .order_by(queue.c.available_at)
        .limit(1)
        .lateral("first")
    )
    seconds = cast(extract("epoch", func.min(first.c.available_at) - func.now()), Double)
    return select(seconds).select_from(pairs.join(first, true()))


def renew_claims(queue: Table) -> Executable:
    """Renews claims to `lease` seconds from now.

    Locked rows are skipped, so that it never waits: they may be acknowledged at the same time.
    """
    held = _held(queue)
    found = (
        select(queue.c.task_id)
        .where(*_is_held(queue, held))
        .with_for_update(of=queue, skip_locked=True)
        .cte("found")
    )
    return update(queue).where(is_any_of(queue, found)).values(available_at=_from_now("lease"))


def release_claims(queue: Table) -> Executable:
    """Releases claims: the tasks are due in `delay` seconds; null means since they were sent.

    `undelivered` is 1 if execution has not begun, so that it does not count as a delivery. The
    claims end: a late renewal, or a repetition of this statement, changes nothing.
    """
    held = _held(queue)
    undelivered = bindparam("undelivered", type_=SmallInteger)
    return (
        update(queue)
        .where(*_is_held(queue, held))
        .values(
            available_at=func.coalesce(_from_now("delay"), queue.c.queued_at),
            claim=queue.c.claim + 1,
            deliveries=queue.c.deliveries - undelivered,
            worker=null(),
        )
    )


def park_claims(queue: Table) -> Executable:
    """Parks the tasks of claims: they stay in the queue, but are never due. The claims end."""
    held = _held(queue)
    values = {"available_at": NEVER, "claim": queue.c.claim + 1}
    return update(queue).where(*_is_held(queue, held)).values(values)


def acknowledge_claims(queue: Table) -> Executable:
    """Deletes the tasks of claims; returns the claims that were still held (task id, claim)."""
    held = _held(queue)
    deleted = delete(queue).where(*_is_held(queue, held))
    return deleted.returning(queue.c.task_id, queue.c.claim)


def _held(queue: Table) -> FromClause:
    return unnested([queue.c.task_id, queue.c.claim], _GIVEN)


def _is_held(queue: Table, held: FromClause) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return queue.c.task_id == held.c.task_id, queue.c.claim == held.c.claim


def _is_of(queue: Table, pairs: FromClause) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return queue.c.queue_name == pairs.c.queue_name, queue.c.priority == pairs.c.priority


def is_any_of(queue: Table, found: CTE) -> ColumnElement[bool]:
    """Whether a row is one of those in `found`, which are few."""
    # As an array, which the planner knows to be small: so it never reads the whole table.
    return queue.c.task_id == any_(func.array(select(found.c.task_id).scalar_subquery()))


def _is_known(queue: Table) -> ColumnElement[bool]:
    is_unknown = queue.c.task_name == any_(bindparam(f"{_GIVEN}unknown", type_=ARRAY(Text)))
    # Not `!= ALL`: if all tasks have one name, the planner expects no rows from it, and does not
    # use the index's order.
    return case((is_unknown, false()), else_=true())


def _from_now(parameter: str) -> ColumnElement[Any]:
    return func.now() + as_interval(bindparam(parameter, type_=Double))
