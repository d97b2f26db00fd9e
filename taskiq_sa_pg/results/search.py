"""Results that are found by conditions on their columns; and results that nobody wants any more."""

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
        """Yields the results that find_results() looks for, with their task ids.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        purpose = f"read results in table {self._table}"
        async with aclosing(self._database.stream(statement, batch_size, purpose)) as batches:
            async for rows in batches:
                for row in map(StoredResult._make, rows):
                    # To raise would end the generator, and those behind it could not be had.
                    yield str(row.task_id), self._codec.decode_any(row, with_logs=with_logs)

    async def forget(self, column_ids: Collection[Any]) -> int:
        """Deletes all that there is of these tasks, and returns how many results.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        purpose = f"forget results in table {self._table}"
        deleted = 0
        # In the order of the others' locks.
        for some in in_slices(sorted(column_ids)):
            parameters = {"task_ids": some}
            [(number,)] = await self._database.fetch(self._forget_results, parameters, purpose)
            deleted += number
        return deleted

    @cached_property
    def _forget_results(self) -> Select[Any]:
        return forget_results(self._models)


def find_results(models: Models, where: Where, order_by: OrderBy, batch_size: int) -> Select[Any]:
    """What Search.iterate() is to run.

    Raises:
        TypeError: where or order_by is no SQLAlchemy expression, such as the bool that comes of
            comparing something else.
        ConfigurationError: They ask another table, or batch_size is below 1.
    """
    check_whole("batch_size", batch_size)
    return select_matching(models, *check_expressions(models, where, order_by))


def check_expressions(
    models: Models, where: Where, order_by: OrderBy = ()
) -> tuple[Sequence[Any], Sequence[Any]]:
    """The conditions, and what to order by, each as a list.

    Raises:
        TypeError: where or order_by is no SQLAlchemy expression, such as the bool that comes of
            comparing something else.
        ConfigurationError: They ask another table.
    """
    conditions = _expressions("where", where, "Result.is_err")
    order = _expressions("order_by", order_by, "Result.finished_at.desc()")
    statement = select_matching(models, conditions, order)
    sources = statement.with_only_columns(*statement.selected_columns, *order).get_final_froms()
    for source in sources:
        if source is not models.results_table:
            raise ConfigurationError(
                "where and order_by must be about backend.models.Result, and not about "
                f"{getattr(source, 'description', source)}: use the attributes of that class, and "
                "put another table into a subquery: Result.task_id.in_(select(...))"
            )
    return conditions, order


def _expressions(name: str, given: Any, example: str) -> Sequence[Any]:
    # First, because to iterate over an expression would go on for ever.
    is_one = isinstance(given, _EXPRESSIONS) or not isinstance(given, Iterable)
    expressions = [given] if is_one or isinstance(given, str) else list(given)
    for expression in expressions:
        if not isinstance(expression, _EXPRESSIONS):
            raise TypeError(
                f"{name} takes SQLAlchemy expressions such as {example}, and not {expression!r}: "
                "make them of the attributes of backend.models.Result"
            )
    return expressions
