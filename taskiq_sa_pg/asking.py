"""Results that are found by conditions on their columns; and results that nobody wants any more."""

from collections.abc import AsyncGenerator, Awaitable, Collection, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Final

from sqlalchemy import ColumnExpressionArgument, Select, SQLColumnExpression, TextClause
from taskiq import TaskiqResult

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.exceptions import ConfigurationError, ResultDecodeError
from taskiq_sa_pg.layout import Layout
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.queries import select_matching
from taskiq_sa_pg.rows import StoredResult
from taskiq_sa_pg.statements import MAX_IDS_PER_READ
from taskiq_sa_pg.store import Store

DEFAULT_BATCH_SIZE: Final = 200

_EXPRESSIONS: Final = (SQLColumnExpression, TextClause)

Where = ColumnExpressionArgument[bool] | Iterable[ColumnExpressionArgument[bool]]
OrderBy = ColumnExpressionArgument[Any] | Iterable[ColumnExpressionArgument[Any]]


class Asking:
    """Finds and deletes results of one results table.

    Args:
        store: Where the statements run.
        codec: How rows become results.
        layout: The tables.
    """

    def __init__(self, store: Store, codec: Codec, layout: Layout) -> None:
        self._store = store
        self._codec = codec
        self._layout = layout
        self._table = layout.models.config.qualified_name

    async def iterate(
        self, statement: Select[Any], batch_size: int, with_logs: bool
    ) -> AsyncGenerator[tuple[str, TaskiqResult[Any]], None]:
        """Yields the results that find_results() looks for, with their task ids.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        purpose = f"read results in table {self._table}"
        async with aclosing(self._store.stream(statement, batch_size, purpose)) as batches:
            async for rows in batches:
                for row in map(StoredResult._make, rows):
                    task_id = str(row.task_id)
                    yield task_id, self._decode(task_id, row, with_logs)

    def _decode(self, task_id: str, row: StoredResult, with_logs: bool) -> TaskiqResult[Any]:
        try:
            return self._codec.decode_result(task_id, row, with_logs=with_logs)
        except ResultDecodeError as exc:
            # To raise it would end the generator, and those behind it could not be had.
            return TaskiqResult.model_construct(
                is_err=True,
                log=row.log if with_logs else None,
                return_value=None,
                execution_time=row.execution_time,
                labels={},
                error=exc,
            )

    async def forget(self, column_ids: Collection[Any]) -> int:
        """Deletes all that there is of these tasks, and returns how many results.

        Raises:
            StorageError: PostgreSQL refused it or could not be reached.
        """
        # In the order of the others' locks.
        ordered = sorted(column_ids)
        deleted = 0
        for start in range(0, len(ordered), MAX_IDS_PER_READ):
            deleted += await self._forget_some(ordered[start : start + MAX_IDS_PER_READ])
        return deleted

    async def _forget_some(self, column_ids: Sequence[Any]) -> int:
        def forget() -> Awaitable[Sequence[Any]]:
            statement = self._layout.statements.forget_results
            purpose = f"forget results in table {self._table}"
            return self._store.fetch(statement, {"task_ids": column_ids}, purpose)

        [(number,)] = await self._layout.adapting(forget, uses_status=True)
        return int(number)


def find_results(models: Models, where: Where, order_by: OrderBy, batch_size: int) -> Select[Any]:
    """What Asking.iterate() is to run.

    Raises:
        TypeError: where or order_by is no SQLAlchemy expression, such as the bool that comes of
            comparing something else.
        ConfigurationError: They ask another table, or batch_size is below 1.
    """
    if isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigurationError(f"batch_size must be 1 or more, not {batch_size!r}")
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
    return statement


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
