"""The broker's queue: tasks are sent, claimed by a worker, renewed, released, parked, acknowledged.

A worker may change a row only as long as it holds its claim: the number in `claim`, which grows
whenever the task is claimed, and when it is sent again. Where claims are meant, the parameters are
two arrays, `given_task_id` and `given_claim`.
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

_GIVEN: Final = "given_"  # before the names of parameters, which must not be those of columns
_ZERO: Final = literal_column("0", Integer)
_ONE: Final = literal_column("1", Integer)
NEVER: Final = literal_column("'infinity'::timestamptz", DateTime(timezone=True))


def enqueue_tasks(queue: Table) -> Upsert:
    """Stores tasks that are sent.

    Of a task that a worker has, as a retry middleware sends it, the new message takes the place of
    the old one, whose worker cannot acknowledge it any more. One that still waits stays as it is.
    """

    def finish(statement: PostgresInsert, _: Inserted) -> Insert:
        return replacing_claimed(queue, statement)

    return Upsert(queue, QueueRow._fields, finish)


def replacing_claimed(queue: Table, statement: PostgresInsert) -> PostgresInsert:
    """An INSERT of a task, with what becomes of one of the same id that is there."""
    overwritten = (*QueueRow._fields[1:], "queued_at")
    values: dict[str, Any] = {name: statement.excluded[name] for name in overwritten}
    # No parameters: behind an INSERT ... SELECT, Citus does not know their types.
    values |= {"claim": queue.c.claim + _ONE, "deliveries": _ZERO, "worker": null()}
    return statement.on_conflict_do_update(
        index_elements=["task_id"], set_=values, where=queue.c.worker.is_not(None)
    )


def claim_tasks(queue: Table) -> Executable:
    """Gives at most `size` due tasks to `given_worker`, for `lease` seconds; returns Claimed.

    From the arrays `given_queue_name` and `given_priority`, pair by pair, those that are due the
    longest first; not those whose names are in `given_unknown`. It waits for nobody: tasks that
    another worker is claiming are left out.
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
    """In how many seconds the next task is due, of those as in claim_tasks(); None for never."""
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
    """Prolongs claims to `lease` seconds from now.

    What somebody else is changing is left out, so that it never waits: it may be acknowledged at
    the same time.
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
    """Gives claims back: the tasks are due in `delay` seconds; null means since they were sent.

    `undelivered` is 1 where nobody has begun with them, so that it does not count as a delivery.
    The claims end: neither a renewal that comes late nor a repetition of this changes anything.
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
    """Leaves the tasks of claims in the queue, where no worker takes them; the claims end."""
    held = _held(queue)
    values = {"available_at": NEVER, "claim": queue.c.claim + 1}
    return update(queue).where(*_is_held(queue, held)).values(values)


def acknowledge_claims(queue: Table) -> Executable:
    """Deletes the tasks of claims; returns those that were ours, as task id and claim."""
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
    """Whether a row is one of those that were found, which are few."""
    # As an array, of which PostgreSQL knows that it is small: it never reads the whole table.
    return queue.c.task_id == any_(func.array(select(found.c.task_id).scalar_subquery()))


def _is_known(queue: Table) -> ColumnElement[bool]:
    is_unknown = queue.c.task_name == any_(bindparam(f"{_GIVEN}unknown", type_=ARRAY(Text)))
    # Not `!= ALL`: where all tasks have one name, PostgreSQL takes it to leave none, and gives up
    # the index's order.
    return case((is_unknown, false()), else_=true())


def _from_now(parameter: str) -> ColumnElement[Any]:
    return func.now() + as_interval(bindparam(parameter, type_=Double))
