"""From models to SQLAlchemy Core statements: nothing here awaits, connects or formats a name.

JSON travels as text in both directions, so that neither the driver's nor the application's JSON
codec has a say in it.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Final

from sqlalchemy import (
    Select,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    delete,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql.elements import ColumnElement

from taskiq_sa_pg.models import Models
from taskiq_sa_pg.rows import Features, StoredProgress, StoredResult
from taskiq_sa_pg.upserts import (
    ALL_FEATURES,
    ResultUpserts,
    Upsert,
    deletion,
    locked,
    upsert_progress,
)

MAX_IDS_PER_READ: Final = 200


class Statements:
    """The statements of one configuration, each built when it is first asked for.

    Most processes need few of them. Reads take `task_ids`: a list of column values.

    Args:
        models: The tables.
        features: What the tables have.
        is_tracked: Whether the status of tasks is forgotten with their results.
    """

    def __init__(
        self, models: Models, features: Features = ALL_FEATURES, *, is_tracked: bool = False
    ) -> None:
        self._models = models
        self._features = features
        self._is_tracked = is_tracked and features.has_status

    @cached_property
    def upsert_results(self) -> ResultUpserts:
        """Stores results."""
        return ResultUpserts(self._models, features=self._features, is_tracked=self._is_tracked)

    @cached_property
    def upsert_progress(self) -> Upsert:
        """Stores progress."""
        return upsert_progress(self._models)

    @cached_property
    def select_ready(self) -> Select[Any]:
        """Those of the task ids that have a result."""
        return select_ready(self._models)

    @cached_property
    def select_results(self) -> Select[Any]:
        """The results of the task ids, as StoredResult."""
        return select_results(self._models)

    @cached_property
    def take_results(self) -> Select[Any]:
        """Deletes the results of the task ids with all that goes with them, and returns them."""
        others = others_of(self._models, Features(has_status=self._is_tracked))
        return take_results(self._models, others)

    @cached_property
    def forget_results(self) -> Select[Any]:
        """Deletes all that there is of the task ids; returns how many results."""
        return forget_results(self._models, others_of(self._models, self._features))

    @cached_property
    def select_progress(self) -> Select[Any]:
        """The progress of the task ids, as StoredProgress."""
        return select_progress(self._models)


def others_of(models: Models, features: Features) -> list[Table]:
    """The tables, beside that of results, with rows that go when a result goes."""
    status = models.status_table if features.has_status else None
    return [models.progress_table] if status is None else [models.progress_table, status]


def select_ready(models: Models) -> Select[Any]:
    """Those of the task ids that have a result."""
    results = models.results_table
    return select(results.c.task_id).where(_is_asked_for(results), is_live(results))


def select_having_progress(models: Models) -> Select[Any]:
    """Those of the task ids that have progress."""
    progress = models.progress_table
    return select(progress.c.task_id).where(_is_asked_for(progress))


def select_results(models: Models) -> Select[Any]:
    """The results of the task ids, as StoredResult."""
    results = models.results_table
    return select(*readable(results, StoredResult._fields)).where(
        _is_asked_for(results), is_live(results)
    )


def take_results(models: Models, others: Iterable[Table]) -> Select[Any]:
    """Deletes the results of the task ids, and returns them.

    Args:
        models: The tables.
        others: Tables of which rows with these task ids are deleted, too.
    """
    results = models.results_table
    found = locked(results, _is_asked_for(results) & is_live(results)).cte("found")
    taken = (
        delete(results)
        .where(results.c.task_id == found.c.task_id)
        .returning(*readable(results, StoredResult._fields))
        .cte("taken")
    )
    return select(*taken.c).add_cte(
        *[deletion(other, locked(other, other.c.task_id == taken.c.task_id)) for other in others]
    )


def forget_results(models: Models, others: Iterable[Table]) -> Select[Any]:
    """Deletes results of the task ids; returns how many, expired ones too.

    Args:
        models: The tables.
        others: Tables of which rows with these task ids are deleted, too.
    """
    results = models.results_table
    found = locked(results, _is_asked_for(results)).cte("found")
    gone = (
        delete(results)
        .where(results.c.task_id == found.c.task_id)
        .returning(results.c.task_id)
        .cte("gone")
    )
    count = select(func.count()).select_from(gone)
    # Nothing of the others before the results are gone: other statements lock them in this order.
    are_gone = count.scalar_subquery().is_not(None)
    return count.add_cte(
        *[deletion(other, locked(other, _is_asked_for(other) & are_gone)) for other in others]
    )


def select_progress(models: Models) -> Select[Any]:
    """The progress of the task ids, as StoredProgress."""
    progress = models.progress_table
    return select(*readable(progress, StoredProgress._fields)).where(_is_asked_for(progress))


def notify() -> Select[Any]:
    """Sends notifications: on `channel` the `payloads`, texts of less than 8,000 bytes each."""
    payload = func.unnest(bindparam("payloads", type_=ARRAY(Text))).column_valued("payload")
    return select(func.pg_notify(bindparam("channel", type_=Text), payload).label("sent"))


def readable(source: Table, names: Sequence[str]) -> list[ColumnElement[Any]]:
    """Columns as the codec reads them: JSON as text."""
    columns = [source.c[name] for name in names]
    return [cast(c, Text).label(c.name) if isinstance(c.type, JSONB) else c for c in columns]


def is_live(results: Table) -> ColumnElement[bool]:
    """Whether a result has not expired; one that has is missing."""
    expires_at = results.c.expires_at
    return expires_at.is_(None) | (expires_at > func.now())


def _is_asked_for(source: Table) -> ColumnElement[bool]:
    task_id = source.c.task_id
    return task_id == any_(bindparam("task_ids", type_=ARRAY(task_id.type)))
