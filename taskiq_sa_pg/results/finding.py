"""Finds finished tasks as typed records, latest first, in pages; and reads one in full."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, TypeGuard, get_args

from sqlalchemy import Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import ColumnElement
from taskiq import TaskiqResult

from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.codec import (
    Seconds,
    check_seconds,
    is_plain,
    read_labels,
    storable_text,
)
from taskiq_sa_pg.database import Database, sqlstate_of
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    ResultDecodeError,
    ResultIsMissingError,
    StorageError,
    check_whole,
)
from taskiq_sa_pg.models import Models, TableConfig
from taskiq_sa_pg.results.search import Where, check_expressions
from taskiq_sa_pg.results.settings import Settings

Outcome = Literal["succeeded", "failed"]

DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 1_000

# All results are between these bounds. Both are always given, so that the index can be used.
_FIRST: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST: Final = datetime(9999, 12, 31, tzinfo=UTC)

# In a busy table the last minute fills a page; a table with a few tasks a day needs few statements.
_FIRST_SPAN: Final = timedelta(minutes=1)
_GROWTH: Final = 4

# The fraction of command_timeout for one statement. The server cancels it before we would treat the
# connection as lost, retry, and replace all connections. The sum of all statements is within the
# limit, too, because each takes about four times as long as the previous one.
_SHARE: Final = 1 / 3

_QUERY_CANCELED: Final = "57014"

_CURSOR: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6})Z_(.*)", re.DOTALL)

# Characters of an invalid argument in messages.
_MAX_SHOWN: Final = 200

# The largest position of an argument in PostgreSQL.
_MAX_POSITION: Final = 2_147_483_647


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A finished task, without its values. All times are in UTC.

    Attributes:
        task_id: The task.
        outcome: "succeeded", or "failed" if it has an error.
        task_name: Its name. It is None, like worker, queued_at and started_at, if
            TaskMetadataMiddleware did not record it.
        worker: The worker that executed it.
        attempt: 0 for the first attempt; each of taskiq's retries adds one.
        error_type: The class of the exception, with its module.
        execution_time: Seconds.
        queued_at: When this attempt was sent, by the sender's clock.
        started_at: When it was started, by the worker's clock.
        finished_at: When its result was stored, by the database's clock.
        expires_at: When the result expires; None for never.
        labels: As in get_result(). A value that only the serializer can read, because it is
            neither JSON nor bytes, is "(serialized)": nothing is unpickled.
    """

    task_id: str
    outcome: Outcome
    task_name: str | None
    worker: str | None
    attempt: int
    error_type: str | None
    execution_time: float
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime
    expires_at: datetime | None
    labels: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskDetails:
    """Everything that is stored for a finished task.

    Attributes:
        record: The task as in a page of find().
        args: The positional arguments as JSON values; None if they were not recorded.
        kwargs: The keyword arguments, in the same form.
        traceback: The traceback of the exception, as text; None for a success.
        result: The result; None if it was not requested or cannot be decoded.
        undecodable: Why a requested result cannot be decoded; else None.
    """

    record: TaskRecord
    args: list[Any] | None
    kwargs: dict[str, Any] | None
    traceback: str | None
    result: TaskiqResult[Any] | None
    undecodable: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """Finished tasks, latest first.

    Attributes:
        records: The tasks.
        next: Pass it as `after` to get the next page; None if this is the last page.
    """

    records: list[TaskRecord]
    next: str | None


class Cursor(NamedTuple):
    """The last task before a page."""

    finished_at: datetime
    column_id: Any


@dataclass(frozen=True, slots=True)
class Query:
    """The checked arguments of find()."""

    conditions: Sequence[ColumnElement[bool]]
    window: float | None  # seconds
    after: Cursor | None
    limit: int


class _TooLongError(Exception):
    """The server canceled a statement. Not retried by the database layer."""


class Finding:
    """Finds finished tasks of one results table, and never deletes any."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._codec = settings.codec
        self._models = settings.models
        self._table = settings.table

    async def find(self, query: Query) -> Page:
        """Returns one page.

        Raises:
            StorageError: PostgreSQL rejected the query or is unreachable, or the query took too
                long.
        """
        limit = self._database.command_timeout * _SHARE

        async def read(connection: AsyncConnection) -> list[sql.StoredRecord]:
            now = (await connection.execute(sql.begin_search(limit))).scalar_one()
            found: list[sql.StoredRecord] = []
            for span in _spans(now.astimezone(UTC), query.window, query.after):
                # One row more, to know whether there is another page.
                missing = query.limit + 1 - len(found)
                statement = sql.select_records(self._models, query.conditions, span, missing)
                try:
                    rows = await connection.execute(statement)
                except DBAPIError as exc:
                    if sqlstate_of(exc) == _QUERY_CANCELED:
                        raise _TooLongError from exc
                    raise
                found += map(sql.StoredRecord._make, rows)
                if len(found) > query.limit:
                    break
            return found

        purpose = f"find results in table {self._table}"
        try:
            found = await self._database.transact(read, purpose)
        except _TooLongError as exc:
            raise StorageError(
                f"cannot {purpose}: a statement was canceled, by default after {limit:g} s, a "
                "third of command_timeout. Few results match the conditions, so much of the table "
                "was read: pass window=, or create an index for the conditions",
                _QUERY_CANCELED,
            ) from exc
        records = [_record_of(stored) for stored in found[: query.limit]]
        return Page(records, _cursor_of(records[-1]) if len(found) > query.limit else None)

    async def read_details(self, column_id: Any, *, with_result: bool) -> TaskDetails:
        """Returns everything about one task; its result only if `with_result`.

        Raises:
            ResultIsMissingError: It has no result.
            StorageError: PostgreSQL rejected the query or is unreachable.
        """
        statement = self._select_all if with_result else self._select_details
        purpose = f"read the details of a result in table {self._table}"
        rows = await self._database.fetch(statement, {"task_ids": [column_id]}, purpose)
        if not rows:
            raise ResultIsMissingError(str(column_id), self._table)
        values = list(rows[0])
        of_record, of_details = len(sql.StoredRecord._fields), len(sql.StoredDetails._fields)
        stored = sql.StoredRecord._make(values[:of_record])
        details = sql.StoredDetails._make(values[of_record:][:of_details])
        result = undecodable = None
        if with_result:
            try:
                result = self._decode(stored, *values[of_record + of_details :])
            except ResultDecodeError as exc:
                undecodable = str(exc)
        return TaskDetails(
            _record_of(stored),
            None if details.args is None else json.loads(details.args),
            None if details.kwargs is None else json.loads(details.kwargs),
            details.traceback,
            result,
            undecodable,
        )

    def _decode(
        self, stored: sql.StoredRecord, return_value: Any, error: Any, log: str | None
    ) -> TaskiqResult[Any]:
        whole = sql.StoredResult(
            stored.task_id,
            stored.is_err,
            return_value,
            error,
            stored.error_type,
            stored.execution_time,
            stored.labels,
            log,
        )
        return self._codec.decode_result(whole, with_logs=True)

    @cached_property
    def _select_details(self) -> Select[Any]:
        return sql.select_details(self._models, with_payload=False)

    @cached_property
    def _select_all(self) -> Select[Any]:
        return sql.select_details(self._models, with_payload=True)


def check_query(
    models: Models,
    where: Where = (),
    *,
    window: Seconds | None,
    outcome: Outcome | None,
    name: str | None,
    worker: str | None,
    label: Mapping[str, Any] | None,
    argument: Any,
    after: str | None,
    limit: int,
) -> Query:
    """Checks the arguments of find().

    Raises:
        TypeError: `where` is not a SQLAlchemy expression.
        ConfigurationError: Another argument is invalid; names it.
    """
    conditions = list(check_expressions(models, where)[0])
    if outcome is not None:
        if outcome not in get_args(Outcome):
            allowed = ", ".join(map(repr, get_args(Outcome)))
            raise ConfigurationError(f"outcome must be one of {allowed}, or None, not {outcome!r}")
        conditions.append(sql.has_outcome(models, is_err=outcome == "failed"))
    for argument_name, column, text in (("name", "task_name", name), ("worker", "worker", worker)):
        if text is not None:
            if not isinstance(text, str):
                raise ConfigurationError(f"{argument_name} must be a str or None, not {text!r}")
            conditions.append(sql.has_text(models, column, _storable(argument_name, text)))
    conditions += _conditions_on_labels(models, label)
    conditions += _conditions_on_arguments(models, argument)
    check_whole("limit", limit)
    if limit > MAX_LIMIT:
        raise ConfigurationError(f"limit must be at most {MAX_LIMIT}, not {limit}")
    return Query(conditions, check_seconds("window", window), _parse(after, models.config), limit)


def _conditions_on_labels(models: Models, label: object) -> Iterator[ColumnElement[bool]]:
    if label is None:
        return
    if not isinstance(label, Mapping) or not all(isinstance(key, str) for key in label):
        raise ConfigurationError(
            f'label must be a dict of values by name, such as {{"user": 42}}, not {label!r}'
        )
    for key, value in label.items():
        yield sql.has_label(models, _storable("label", key), _alike("label", value))


def _conditions_on_arguments(models: Models, argument: object) -> Iterator[ColumnElement[bool]]:
    if argument is None:
        return
    if not isinstance(argument, Mapping):
        yield sql.has_any_argument(models, _alike("argument", argument))
        return
    for key, value in argument.items():
        if isinstance(key, str):
            _storable("argument", key)
        elif not isinstance(key, int) or isinstance(key, bool) or abs(key) > _MAX_POSITION:
            raise ConfigurationError(
                "argument must be a value, or a dict of values by name or position, such as "
                f'{{"order_id": 42}} or {{0: 42}}: {key!r} is neither'
            )
        yield sql.has_argument(models, key, _alike("argument", value))


def _alike(argument: str, value: object) -> list[sql.Scalar]:
    """The values that are equal as text: 42 and "42".

    Raises:
        ConfigurationError: The value cannot be compared.
    """
    if isinstance(value, str):
        _storable(argument, value)
        with suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            if _is_scalar(parsed) and not isinstance(parsed, str):
                return [value, parsed]
        return [value]
    if not _is_scalar(value):
        raise ConfigurationError(
            f"{argument} must have values that JSON supports, such as a str, an int, True or None, "
            f"not this {type(value).__qualname__}"
        )
    return [value, json.dumps(value)]


def _is_scalar(value: object) -> TypeGuard[sql.Scalar]:
    return isinstance(value, str | int | float | bool | None) and is_plain(value)


def _storable(argument: str, text: str) -> str:
    if text != storable_text(text):
        raise ConfigurationError(
            f"{argument} has NUL or lone surrogates, which PostgreSQL cannot store: "
            f"{text[:_MAX_SHOWN]!r}"
        )
    return text


def _spans(now: datetime, window: float | None, after: Cursor | None) -> Iterator[sql.Span]:
    """The slices of time to search, one after the other."""
    oldest = _FIRST
    if window is not None:
        oldest = now - timedelta(seconds=min(window, (now - _FIRST).total_seconds()))
    # After a failover, results may have times of a clock that was ahead; they are found, too.
    end, before_id = (_LAST, None) if after is None else after
    span, start = _FIRST_SPAN, min(end, now)
    while end > oldest or (end == oldest and before_id is not None):
        start = max(oldest, start - span) if start - oldest > span else oldest
        yield sql.Span(start, end, before_id)
        end, before_id, span = start, None, span * _GROWTH


def _cursor_of(record: TaskRecord) -> str:
    at = record.finished_at.replace(tzinfo=None).isoformat(timespec="microseconds")
    return f"{at}Z_{record.task_id}"


def _parse(after: object, config: TableConfig) -> Cursor | None:
    if after is None:
        return None
    if isinstance(after, str) and (match := _CURSOR.fullmatch(after)):
        with suppress(ValueError):  # an invalid time or task id
            at = datetime.fromisoformat(match[1]).replace(tzinfo=UTC)
            return Cursor(at, config.to_column_task_id(match[2]))
    raise ConfigurationError(
        f"after must be the `next` of a page of find(), or None, not {repr(after)[:_MAX_SHOWN]}"
    )


def _record_of(stored: sql.StoredRecord) -> TaskRecord:
    return TaskRecord(
        task_id=str(stored.task_id),
        outcome="failed" if stored.is_err else "succeeded",
        task_name=stored.task_name,
        worker=stored.worker,
        attempt=stored.attempt,
        error_type=stored.error_type,
        execution_time=stored.execution_time,
        queued_at=_in_utc(stored.queued_at),
        started_at=_in_utc(stored.started_at),
        finished_at=stored.finished_at.astimezone(UTC),
        expires_at=_in_utc(stored.expires_at),
        labels=read_labels(stored.labels),
    )


def _in_utc(time: datetime | None) -> datetime | None:
    # Drivers return times in various zones.
    return None if time is None else time.astimezone(UTC)
