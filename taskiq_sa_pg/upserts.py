"""How rows are stored: INSERT ... ON CONFLICT, as SQLAlchemy Core statements."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    CTE,
    Column,
    Insert,
    Select,
    Table,
    Uuid,
    and_,
    bindparam,
    collate,
    delete,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import Insert as PostgresInsert
from sqlalchemy.sql.elements import ColumnElement

from taskiq_sa_pg.mixins import METADATA
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.row_parameters import (
    NOTHING,
    as_alike,
    as_arrays,
    can_be_unnested,
    columns_of,
    common_in,
    insert_alike,
    insert_one,
    insert_unnested,
    or_of_all,
    shared_fields,
    unnested,
    wire_type,
)
from taskiq_sa_pg.rows import (
    FIRST_FIELDS,
    METADATA_COLUMNS,
    Features,
    ProgressRow,
    ResultRow,
    StatusRow,
)

# The execution option that names the parameters to be converted; others come as drivers take them.
CONVERTED: Final = "taskiq_sa_pg_converted"

ALL_FEATURES: Final = Features()

# A statement and its parameters.
Call = tuple[Insert, dict[str, Any]]


class Upsert(NamedTuple):
    """Stores rows, in one of three shapes.

    One array a column serves any number of rows with one text; where all of them have the same in a
    column, it goes once. As rows have in most batches, the second text has no arrays for such
    columns at all, which are most: to encode and unnest empty ones takes long. A row alone is worth
    a text of its own: its arrays would take PostgreSQL and asyncpg longer than all the rest.

    Attributes:
        one: For one row.
        many: For rows that differ anywhere; where it is None, all go alone.
        alike: For rows that have the same in the `shared` columns.
        fields: The first of the rows', which are stored.
        shared: Fields that rows are likely to have in common.
    """

    one: Insert
    many: Insert | None
    alike: Insert | None
    fields: tuple[str, ...]
    shared: frozenset[str]

    def of(self, rows: Sequence[Any]) -> Sequence[Call]:
        """What stores one or more rows with distinct task ids; one statement, if there is many."""
        if len(rows) == 1:
            return [(self.one, dict(zip(self.fields, rows[0], strict=False)))]
        # Upserts that overlap and lock their rows in different orders deadlock.
        rows = sorted(rows, key=itemgetter(0))
        if self.many is None:
            return [(self.one, dict(zip(self.fields, row, strict=False))) for row in rows]
        columns = columns_of(self.fields, rows)
        common = common_in(columns)
        if self.alike is not None and common.keys() >= self.shared:
            return [(self.alike, as_alike(columns, common, self.shared))]
        return [(self.many, as_arrays(columns, common))]


class ResultUpserts:
    """Stores results; columns that none of them fills cost nothing.

    Args:
        models: The tables.
        extra: Columns of the application's own that are filled, by parameter.
        features: What the tables have.
        is_tracked: Whether the status of the tasks is forgotten with it.
    """

    def __init__(
        self,
        models: Models,
        extra: Mapping[str, Column[Any]] = NOTHING,
        features: Features = ALL_FEATURES,
        *,
        is_tracked: bool = False,
    ) -> None:
        self._models = models
        self._extra = extra
        self._has_metadata = features.has_metadata and has_metadata_columns(models)
        self._status = models.status_table if is_tracked and features.has_status else None

    @cached_property
    def without_metadata(self) -> Upsert:
        """For rows of which none has metadata."""
        # NULL in the columns that are not named, over what an earlier attempt left there.
        cleared = METADATA_COLUMNS if self._has_metadata else ()
        return self._storing(FIRST_FIELDS, cleared)

    @cached_property
    def with_metadata(self) -> Upsert:
        """For other rows; as without_metadata where there is no place for metadata."""
        return self._storing(ResultRow._fields) if self._has_metadata else self.without_metadata

    def _storing(self, fields: tuple[str, ...], cleared: Sequence[str] = ()) -> Upsert:
        upsert = upsert_results(self._models, fields, self._extra, cleared)
        return upsert if self._status is None else _forgetting(self._status, upsert)

    def of(self, rows: Sequence[ResultRow]) -> Sequence[Call]:
        """What stores rows, as Upsert.of()."""
        for row in rows:
            if row.started_at is not None:
                return self.with_metadata.of(rows)
        return self.without_metadata.of(rows)


def has_metadata_columns(models: Models) -> bool:
    """Whether METADATA_COLUMNS of the model are ours and none is the application's own."""
    columns = models.results_table.c
    return all(name in columns and columns[name].info == METADATA for name in METADATA_COLUMNS)


def upsert_results(
    models: Models,
    fields: tuple[str, ...] = FIRST_FIELDS,
    extra: Mapping[str, Column[Any]] = NOTHING,
    cleared: Sequence[str] = (),
) -> Upsert:
    """Stores results over those of equal or earlier attempts, and over those that have expired.

    Args:
        models: The tables.
        fields: Those of ResultRow that are stored, from the first on.
        extra: Other columns that are stored, by parameter.
        cleared: Columns that get their defaults instead of what they had.
    """
    results = models.results_table
    overwritten = (*fields[1:], *cleared, "finished_at", *[c.key for c in extra.values()])

    def over_earlier(statement: PostgresInsert) -> Insert:
        is_later = statement.excluded.attempt >= results.c.attempt
        return _on_conflict(
            statement, overwritten, where=is_later | _has_expired(results, statement)
        ).execution_options(**{CONVERTED: tuple(extra)} if extra else {})

    return _upsert(results, fields, over_earlier, extra)


def upsert_progress(models: Models) -> Upsert:
    """Stores progress, replacing what was there."""
    fields = ProgressRow._fields
    overwritten = (*fields[1:], "updated_at")
    return _upsert(
        models.progress_table, fields, lambda statement: _on_conflict(statement, overwritten)
    )


def upsert_status(status: Table) -> Upsert:
    """Stores what a task is at, unless a later attempt or execution of it was stored before."""
    fields = StatusRow._fields

    def unless_earlier(statement: PostgresInsert) -> Insert:
        new, old = statement.excluded, status.c
        is_same_or_later_execution = or_(
            new.started_at.is_(None), old.started_at.is_(None), new.started_at >= old.started_at
        )
        where = (new.attempt > old.attempt) | and_(
            new.attempt == old.attempt, is_same_or_later_execution
        )
        return _on_conflict(statement, (*fields[1:], "updated_at"), where)

    return _upsert(status, fields, unless_earlier)


def _forgetting(status: Table, upsert: Upsert) -> Upsert:
    """Deletes the status of those tasks, too, unless it is of a later attempt."""
    task_id = bindparam("task_id", type_=wire_type(status.c.task_id))
    attempt = bindparam("attempt", type_=wire_type(status.c.attempt))
    alone = locked(status, (status.c.task_id == task_id) & (status.c.attempt <= attempt))
    one, many, alike = upsert.one.add_cte(deletion(status, alone)), upsert.many, upsert.alike
    if many is not None:
        many = many.add_cte(forget_statuses(status))
    if alike is not None:
        alike = alike.add_cte(forget_statuses(status, up_to=attempt))
    return upsert._replace(one=one, many=many, alike=alike)


def forget_statuses(status: Table, up_to: ColumnElement[int] | None = None) -> CTE:
    """Deletes what tasks were at, unless it is of a later attempt.

    Takes `task_id` and `attempt` as they store the results of these tasks; with `up_to`, which is
    the attempt of all of them, only `task_id`.
    """
    columns = [status.c.task_id] if up_to is not None else [status.c.task_id, status.c.attempt]
    finished = unnested(columns, "finished")
    if up_to is None:
        up_to = or_of_all(finished.c.attempt, status.c.attempt)
    is_over = (status.c.task_id == finished.c.task_id) & (status.c.attempt <= up_to)
    return deletion(status, locked(status, is_over))


def deletion(source: Table, task_ids: Select[Any]) -> CTE:
    """Deletes rows, of which locked() has the ids, as a part of a statement."""
    doomed = task_ids.cte()
    return delete(source).where(source.c.task_id == doomed.c.task_id).cte()


def locked(source: Table, condition: ColumnElement[bool]) -> Select[Any]:
    """The ids of rows, which are locked in the order in which upserts lock theirs."""
    # Python's order: else the two could deadlock.
    task_id = source.c.task_id
    order = task_id if isinstance(task_id.type, Uuid) else collate(task_id, "C")
    return select(task_id).where(condition).order_by(order).with_for_update(of=source)


def insert_results(models: Models, features: Features = ALL_FEATURES) -> Upsert:
    """Stores results where there are none but expired ones; returns the task ids of those."""
    results = models.results_table
    cleared = METADATA_COLUMNS if features.has_metadata and has_metadata_columns(models) else ()
    overwritten = (*FIRST_FIELDS[1:], *cleared, "finished_at")

    def unless_there(statement: PostgresInsert) -> Insert:
        return _on_conflict(
            statement, overwritten, where=_has_expired(results, statement)
        ).returning(results.c.task_id)

    return _upsert(results, FIRST_FIELDS, unless_there)


def insert_progress(models: Models) -> Upsert:
    """Stores progress where there is none, and returns the task ids of that."""
    progress = models.progress_table

    def unless_there(statement: PostgresInsert) -> Insert:
        unless = statement.on_conflict_do_nothing(index_elements=["task_id"])
        return unless.returning(progress.c.task_id)

    return _upsert(progress, ProgressRow._fields, unless_there)


def _on_conflict(
    statement: PostgresInsert,
    overwritten: Sequence[str],
    where: ColumnElement[bool] | None = None,
) -> Insert:
    # `excluded` alone on the right, because Citus refuses now() there; its finished_at and
    # updated_at are the columns' defaults.
    return statement.on_conflict_do_update(
        index_elements=["task_id"],
        set_={name: statement.excluded[name] for name in overwritten},
        where=where,
    )


def _has_expired(results: Table, statement: PostgresInsert) -> ColumnElement[bool]:
    # Of the row in the way. The new one's finished_at is now, which Citus refuses to be asked for.
    return results.c.expires_at <= statement.excluded.finished_at


def _upsert(
    target: Table,
    fields: tuple[str, ...],
    with_conflicts: Callable[[PostgresInsert], Insert],
    extra: Mapping[str, Column[Any]] = NOTHING,
) -> Upsert:
    shared = shared_fields(fields)
    one = with_conflicts(insert_one(target, fields, extra))
    many = alike = None
    if can_be_unnested(target, extra):
        many = with_conflicts(insert_unnested(target, fields, extra))
        alike = with_conflicts(insert_alike(target, fields, shared, extra))
    return Upsert(one, many, alike, fields, shared)
