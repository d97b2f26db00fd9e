"""Finds results by conditions on their columns, and deletes results by task id."""

from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any, Final

from sqlalchemy import ColumnExpressionArgument, Select, SQLColumnExpression, TextClause
from taskiq import TaskiqResult

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError, check_whole
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.statements import StoredResult, forget_results, in_slices, select_matching

DEFAULT_BATCH_SIZE: Final = 200

_EXPRESSIONS: Final = (SQLColumnExpression, TextClause)

Where = ColumnExpressionArgument[bool] | Iterable[ColumnExpressionArgument[bool]]
OrderBy = ColumnExpressionArgument[Any] | Iterable[ColumnExpressionArgument[Any]]


class Search:
    """Finds and deletes results of one results table."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._codec = settings.codec
        self._models = settings.models
        self._table = settings.table

    async def iterate(
        self, statement: Select[Any], batch_size: int, with_logs: bool
    ) -> AsyncGenerator[tuple[str, TaskiqResult[Any]], None]:
        """Yields the results of the statement of find_results(), with their task ids.

        Raises:
            StorageError: PostgreSQL rejected the statement or is unreachable.
        """
        purpose = f"read results in table {self._table}"
        async with aclosing(self._database.stream(statement, batch_size, purpose)) as batches:
            async for rows in batches:
                for row in map(StoredResult._make, rows):
                    # Raising an error would end the generator and lose the following results.
                    yield str(row.task_id), self._codec.decode_any(row, with_logs=with_logs)

    async def forget(self, column_ids: Collection[Any]) -> int:
        """Deletes all rows of these tasks, and returns the number of results.

        Raises:
            StorageError: PostgreSQL rejected a statement or is unreachable.
        """
        purpose = f"forget results in table {self._table}"
        deleted = 0
        # In the order in which other statements lock rows.
        for some in in_slices(sorted(column_ids)):
            parameters = {"task_ids": some}
            [(number,)] = await self._database.fetch(self._forget_results, parameters, purpose)
            deleted += number
        return deleted

    @cached_property
    def _forget_results(self) -> Select[Any]:
        return forget_results(self._models)


def find_results(models: Models, where: Where, order_by: OrderBy, batch_size: int) -> Select[Any]:
    """Returns the statement for Search.iterate().

    Raises:
        TypeError: where or order_by is not a SQLAlchemy expression, but for example a bool.
        ConfigurationError: They refer to another table, or batch_size is below 1.
    """
    check_whole("batch_size", batch_size)
    return select_matching(models, *check_expressions(models, where, order_by))


def check_expressions(
    models: Models, where: Where, order_by: OrderBy = ()
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns the conditions and the order, each as a list.

    Raises:
        TypeError: where or order_by is not a SQLAlchemy expression, but for example a bool.
        ConfigurationError: They refer to another table.
    """
    conditions = _expressions("where", where, "Result.is_err")
    order = _expressions("order_by", order_by, "Result.finished_at.desc()")
    statement = select_matching(models, conditions, order)
    sources = statement.with_only_columns(*statement.selected_columns, *order).get_final_froms()
    for source in sources:
        if source is not models.results_table:
            raise ConfigurationError(
                "where and order_by must refer to backend.models.Result only, not to "
                f"{getattr(source, 'description', source)}: use the attributes of Result, and use "
                "a subquery for another table: Result.task_id.in_(select(...))"
            )
    return conditions, order


def _expressions(name: str, given: Any, example: str) -> Sequence[Any]:
    # Checked first, because iterating over an expression would never end.
    is_one = isinstance(given, _EXPRESSIONS) or not isinstance(given, Iterable)
    expressions = [given] if is_one or isinstance(given, str) else list(given)
    for expression in expressions:
        if not isinstance(expression, _EXPRESSIONS):
            raise TypeError(
                f"{name} takes SQLAlchemy expressions such as {example}, not {expression!r}: "
                "use the attributes of backend.models.Result"
            )
    return expressions
