"""The application's own columns in the results table, and the values that it supplies."""

import inspect
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from taskiq import TaskiqResult

from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.models import Models

logger = logging.getLogger(__name__)

ExtraValuesFunction = Callable[[str, TaskiqResult[Any]], Mapping[str, Any]]


class ExtraValues:
    """Gets the values of the application's own columns from its function.

    Raises:
        ConfigurationError: The function is not callable or is async, or the model has no own
            columns.
    """

    def __init__(self, function: ExtraValuesFunction, models: Models) -> None:
        if not callable(function):
            raise ConfigurationError(f"extra_values must be a callable, not {function!r}")
        if _is_async(function):
            raise ConfigurationError(
                "extra_values must be an ordinary function, not an async one: set_result() calls "
                "it without await"
            )
        self._function = function
        self.columns = models.own_columns
        if not self.columns:
            raise ConfigurationError(
                "extra_values fills your own columns, but the model has none: subclass "
                "ResultMixin with a column, and pass models=Models(Result, Progress)"
            )

    def of(self, task_id: str, result: TaskiqResult[Any]) -> Mapping[str, Any]:
        """The values by attribute of the model; if they are invalid, logs it and returns none."""
        try:
            values = self._function(task_id, result)
            if isinstance(values, Coroutine):
                values.close()
            self._check(values)
            return dict(values)
        except Exception:
            # An error in them must not lose the result.
            logger.exception("task %s: its result is stored without extra_values", task_id)
            return {}

    def _check(self, values: object) -> None:
        if not isinstance(values, Mapping):
            raise TypeError(f"extra_values must return a dict, not {type(values).__qualname__}")
        unknown = [name for name in values if name not in self.columns]
        if unknown:
            raise ValueError(
                f"extra_values returned {', '.join(map(repr, unknown))}, but can only fill the "
                f"attributes {', '.join(self.columns)}"
            )


def _is_async(function: object) -> bool:
    return any(
        inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f)
        for f in (function, getattr(function, "__call__", None))  # noqa: B004 - to inspect it
    )
