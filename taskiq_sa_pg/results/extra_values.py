"""Columns of the application's own in the results table, and the values that it has for them."""

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
        self.columns = models.own_columns
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


def _is_async(function: object) -> bool:
    return any(
        inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f)
        for f in (function, getattr(function, "__call__", None))  # noqa: B004 - not whether it has one
    )
