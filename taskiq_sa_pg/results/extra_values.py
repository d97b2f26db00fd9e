"""Columns of the application's own in the results table, and the values that it has for them."""

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from taskiq import TaskiqResult

from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.statements import RESULT_COLUMNS, Call, Upsert, upsert_results

logger = logging.getLogger(__name__)

ExtraValuesFunction = Callable[[str, TaskiqResult[Any]], Mapping[str, Any]]

# A result's row with values for columns of the application's own, by attribute of the model.
ExtendedRow = Mapping[str, Any]


class ExtraValues:
    """Asks the application for the values of its own columns.

    Raises:
        ConfigurationError: The function cannot be called or is asynchronous, or there is no column
            to fill.
    """

    def __init__(self, function: ExtraValuesFunction, models: Models) -> None:
        if not callable(function):
            raise ConfigurationError(f"extra_values must be a callable, not {function!r}")
        if _is_async(function):
            raise ConfigurationError(
                "extra_values must be an ordinary function, not an async one: it is called in the "
                "middle of set_result(), and has nothing to wait for"
            )
        self._function = function
        self.columns = _extra_columns(models)
        if not self.columns:
            raise ConfigurationError(
                "extra_values fills columns of your own, and the model has none: subclass "
                "ResultMixin with a column, and pass models=Models(Result, Progress)"
            )

    def of(self, task_id: str, result: TaskiqResult[Any]) -> Mapping[str, Any]:
        """The values by attribute of the model; none where they cannot be used, which is logged."""
        try:
            values = self._function(task_id, result)
            if isinstance(values, Coroutine):
                values.close()
            self._check(values)
            return dict(values)
        except Exception:
            # Whatever is wrong with them, the result must not be lost.
            logger.exception("task %s: its result goes without its extra_values", task_id)
            return {}

    def _check(self, values: object) -> None:
        if not isinstance(values, Mapping):
            raise TypeError(f"extra_values must return a dict, not {type(values).__qualname__}")
        unknown = [name for name in values if name not in self.columns]
        if unknown:
            raise ValueError(
                f"extra_values returned {', '.join(map(repr, unknown))}; the attributes that it "
                f"can fill are {', '.join(self.columns)}"
            )


class ExtendedUpserts:
    """Stores results with values for columns of the application's own.

    Rows that fill the same columns share a statement: it leaves a column alone, and gives it its
    default, for all of its rows or for none.
    """

    def __init__(self, models: Models, *, is_tracked: bool) -> None:
        self._models = models
        self._is_tracked = is_tracked
        self._columns = _extra_columns(models)
        self._upserts: dict[frozenset[str], Upsert] = {}

    def of(self, rows: Iterable[ExtendedRow]) -> list[Call]:
        """The statements for rows with distinct task ids, and their parameters."""
        groups: defaultdict[frozenset[str], list[ExtendedRow]] = defaultdict(list)
        for row in rows:
            groups[frozenset(row.keys() & self._columns.keys())].append(row)
        return [
            call
            for names, group in groups.items()
            for call in self._upsert(names).of_mappings(group)
        ]

    def without_extra(self, row: ExtendedRow) -> ExtendedRow:
        """The row of the result alone."""
        return {name: value for name, value in row.items() if name not in self._columns}

    def _upsert(self, names: frozenset[str]) -> Upsert:
        if names not in self._upserts:
            filled = {name: column for name, column in self._columns.items() if name in names}
            upsert = upsert_results(self._models, filled, is_tracked=self._is_tracked)
            self._upserts[names] = upsert
        return self._upserts[names]


def _extra_columns(models: Models) -> dict[str, sa.Column[Any]]:
    """The columns of the application's own that a value can be given to, by attribute of Result."""
    # Mapper.columns, because to ask for attributes configures all of the application's mappers,
    # and some of their classes may not be there yet.
    return {
        name: column
        for name, column in sa.inspect(models.Result).columns.items()
        if isinstance(column, sa.Column)
        and column.table is models.results_table
        and column.name not in RESULT_COLUMNS
        and column.computed is None
        and not (column.identity is not None and column.identity.always)
    }


def _is_async(function: object) -> bool:
    return any(
        inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f)
        for f in (function, getattr(function, "__call__", None))  # noqa: B004 - not whether it has one
    )
