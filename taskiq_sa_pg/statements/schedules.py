"""The broker's schedules: statements to store them, and to send their tasks once for each tick.

A tick is a time at which a schedule is due. The scheduler that sets `last_tick` to it, or deletes
the row of a one-time schedule, sends the task in the same statement. For all others the statement
then finds nothing.

No parameter of an UPDATE has the name of a column, because SQLAlchemy would set the column to it.
"""

from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    CTE,
    Boolean,
    ColumnElement,
    Double,
    Executable,
    Insert,
    Integer,
    Interval,
    Select,
    Table,
    Text,
    all_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    extract,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.dialects.postgresql import insert

from taskiq_sa_pg.statements.queue import replacing_claimed
from taskiq_sa_pg.statements.rows import ListedSchedule, QueueRow, ScheduleRow
from taskiq_sa_pg.statements.shapes import Inserted, Upsert, as_stored, unnested, wire_type

# A scheduler checks at whole seconds, and may be a little early or late.
_EARLY: Final = literal_column("interval '0.5 seconds'", Interval())
_LATE: Final = literal_column("interval '1 second'", Interval())


def send_by_cron(queue: Table, schedules: Table) -> Executable:
    """Sends the task of a schedule that is due in the minute `due_minute`; returns Sent.

    `due_cron` is the expression that is due: if the schedule has changed, nothing is sent.
    """
    tick = bindparam("due_minute", type_=schedules.c.last_tick.type)
    won = (
        update(schedules)
        .where(
            _is_the_one(schedules),
            schedules.c.cron == bindparam("due_cron", type_=Text),
            or_(schedules.c.last_tick.is_(None), schedules.c.last_tick < tick),
        )
        .values(last_tick=tick)
        .returning(cast(null(), Double).label("seconds"))
        .cte("won")
    )
    return _sending(queue, won, cast(null(), Double))


def send_at_interval(queue: Table, schedules: Table) -> Executable:
    """Sends the task of a schedule whose interval has passed since its last tick; returns Sent.

    Ticks do not drift: one that is sent up to a second late does not delay the next.
    """
    last_tick, interval = schedules.c.last_tick, schedules.c.interval
    due_at = last_tick + interval
    tick = case((due_at >= func.now() - _LATE, due_at), else_=func.now())
    # In a SELECT, because Citus cannot add an interval to a column in an UPDATE. The first to
    # change last_tick sends the task.
    due = (
        select(last_tick, interval, tick.label("tick"), _seconds_until(tick + interval))
        .where(
            _is_the_one(schedules),
            interval.is_not(None),
            or_(last_tick.is_(None), due_at <= func.now() + _EARLY),
        )
        .cte("due")
    )
    won = (
        update(schedules)
        .where(
            _is_the_one(schedules),
            last_tick.is_not_distinct_from(due.c.last_tick),
            interval == due.c.interval,
        )
        .values(last_tick=due.c.tick)
        .returning(due.c.seconds)
        .cte("won")
    )
    left = select(_seconds_until(due_at)).where(_is_the_one(schedules)).scalar_subquery()
    return _sending(queue, won, left)


def _seconds_until(time: ColumnElement[Any]) -> ColumnElement[float]:
    return cast(extract("epoch", time - func.now()), Double).label("seconds")


def send_once(queue: Table, schedules: Table) -> Executable:
    """Sends the task of a one-time schedule that is due at `due_time`; returns Sent.

    The schedule is then deleted. A schedule from a label stays; otherwise the next startup would
    store it again.
    """
    time = bindparam("due_time", type_=schedules.c.time.type)
    is_due = _is_the_one(schedules), schedules.c.time == time
    nothing = cast(null(), Double).label("seconds")
    kept = (
        update(schedules)
        .where(*is_due, schedules.c.is_labelled, schedules.c.last_tick.is_(None))
        .values(last_tick=time)
        .returning(nothing)
        .cte("kept")
    )
    gone = delete(schedules).where(*is_due, ~schedules.c.is_labelled).returning(nothing).cte("gone")
    won = union_all(select(kept.c.seconds), select(gone.c.seconds)).cte("won")
    return _sending(queue, won, cast(null(), Double))


def _sending(queue: Table, won: CTE, left: ColumnElement[Any]) -> Executable:
    """Stores a task if there is a row `won`; its parameters are a QueueRow's, as `task_...`."""
    columns = [queue.c[name] for name in QueueRow._fields]
    values = [as_stored(bindparam(f"task_{c.name}", type_=wire_type(c)), c) for c in columns]
    stored = insert(queue).from_select(QueueRow._fields, select(*values).select_from(won))
    sent = replacing_claimed(queue, stored).returning(queue.c.task_id).cte("sent")
    seconds = func.coalesce(select(won.c.seconds).scalar_subquery(), left)
    return select(exists(select(won.c.seconds)), seconds).add_cte(sent)


def upsert_schedule(schedules: Table) -> Upsert:
    """Stores or replaces a schedule; it becomes due again only if its time has changed."""

    def finish(statement: PostgresInsert, _: Inserted) -> Insert:
        return statement.on_conflict_do_update(
            index_elements=["schedule_id"], set_=_replaced(schedules, statement)
        )

    return Upsert(schedules, ScheduleRow._fields, finish)


def store_labelled(schedules: Table) -> Executable:
    """Stores the schedules from labels, and deletes those that are no longer in any label.

    The rows are passed as arrays with the names of ScheduleRow's fields. It deletes only schedules
    from labels: those of the tasks `known`, or of all tasks if `is_complete`.
    """
    columns = [schedules.c[name] for name in ScheduleRow._fields]
    ids = bindparam("schedule_id", type_=ARRAY(Text))
    is_known = schedules.c.task_name == any_(bindparam("known", type_=ARRAY(Text)))
    gone = (
        delete(schedules)
        .where(
            schedules.c.is_labelled,
            schedules.c.schedule_id != all_(ids),
            or_(bindparam("is_complete", type_=Boolean), is_known),
        )
        .returning(schedules.c.schedule_id)
        .cte("gone")
    )
    rows = unnested(columns)
    in_order = select(*[rows.c[c.name] for c in columns]).order_by(rows.c.schedule_id)
    statement = insert(schedules).from_select(ScheduleRow._fields, in_order)
    values = _replaced(schedules, statement)
    is_changed = or_(
        *(schedules.c[name].is_distinct_from(statement.excluded[name]) for name in _WRITTEN)
    )
    return statement.on_conflict_do_update(
        index_elements=["schedule_id"], set_=values, where=schedules.c.is_labelled & is_changed
    ).add_cte(gone)


def select_schedules(schedules: Table) -> Select[Any]:
    """All schedules that may still become due, as ScheduleRow."""
    is_over = schedules.c.time.is_not(None) & schedules.c.last_tick.is_not(None)
    columns = [schedules.c[name] for name in ScheduleRow._fields]
    return select(*columns).where(~(schedules.c.is_labelled & is_over))


def list_schedules(schedules: Table) -> Select[Any]:
    """The first `size` schedules by task name, including those that are over."""
    columns = [schedules.c[name] for name in ListedSchedule._fields]
    ordered = select(*columns).order_by(schedules.c.task_name, schedules.c.schedule_id)
    return ordered.limit(bindparam("size", type_=Integer))


def delete_schedule(schedules: Table) -> Executable:
    """Deletes a schedule; returns its id."""
    return delete(schedules).where(_is_the_one(schedules)).returning(schedules.c.schedule_id)


_WRITTEN: Final = ScheduleRow._fields[1:]


def _replaced(schedules: Table, statement: PostgresInsert) -> dict[str, Any]:
    values: dict[str, Any] = {name: statement.excluded[name] for name in _WRITTEN}
    is_same_time = schedules.c.time.is_not_distinct_from(statement.excluded.time)
    return values | {"last_tick": case((is_same_time, schedules.c.last_tick))}


def _is_the_one(schedules: Table) -> ColumnElement[bool]:
    return schedules.c.schedule_id == bindparam("id_sought", type_=Text)
