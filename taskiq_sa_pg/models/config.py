"""TableConfig: the names and types of the tables, with all checks of names and task ids."""

import hashlib
import uuid
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from taskiq_sa_pg.exceptions import ConfigurationError, InvalidTaskIdError

TaskIdField = Literal["VarChar", "Text", "Uuid"]
PayloadField = Literal["Bytea", "Jsonb"]

DEFAULT_TABLE_NAME: Final = "taskiq_results"

# NAMEDATALEN - 1: PostgreSQL silently truncates longer identifiers.
_MAX_IDENTIFIER_BYTES: Final = 63

# Alembic names the primary key of the version table with this suffix.
_VERSION_KEY: Final = "_pkc"

# A third of a b-tree page, without the headers of tuple and value. A text that compresses well
# could be longer, but that cannot be checked in advance.
_MAX_TASK_ID_BYTES: Final = 2_692


@dataclass(frozen=True, slots=True)
class TableConfig:
    """Names and column types of one results table and its related tables.

    Attributes:
        table_name: Name of the results table, case-sensitive, used exactly as given, without its
            schema. All other names derive from it; if one exceeds 63 bytes, a hash replaces the
            end of `table_name` in it.
        field_for_task_id: Type of the task-id column: VARCHAR, TEXT or UUID.
        field_for_payload: Type of the columns of serialized values: BYTEA or JSONB.
        schema: PostgreSQL schema of the tables. None uses the search_path.

    Raises:
        ConfigurationError: A name is too long for PostgreSQL or has a dot, or a type is unknown.
    """

    table_name: str = DEFAULT_TABLE_NAME
    field_for_task_id: TaskIdField = "VarChar"
    field_for_payload: PayloadField = "Bytea"
    schema: str | None = None

    def __post_init__(self) -> None:
        _check_choice("field_for_task_id", self.field_for_task_id, get_args(TaskIdField))
        _check_choice("field_for_payload", self.field_for_payload, get_args(PayloadField))
        _check_identifier("table_name", self.table_name)
        schema, dot, name = self.table_name.rpartition(".")
        if dot:
            raise ConfigurationError(
                f"table_name must not have a dot: {self.table_name!r}. Pass the schema separately: "
                f"schema={schema!r}, table_name={name!r}"
            )
        if self.schema is not None:
            _check_identifier("schema", self.schema)

    @property
    def progress_table_name(self) -> str:
        """Name of the progress table."""
        return _derive(self.table_name, "_progress")

    @property
    def status_table_name(self) -> str:
        """Name of the table of unfinished tasks."""
        return _derive(self.table_name, "_status")

    @property
    def workers_table_name(self) -> str:
        """Name of the table of worker processes."""
        return _derive(self.table_name, "_workers")

    @property
    def queue_table_name(self) -> str:
        """Name of the broker's table of tasks that were sent and have not finished."""
        return _derive(self.table_name, "_queue")

    @property
    def schedules_table_name(self) -> str:
        """Name of the broker's table of schedules."""
        return _derive(self.table_name, "_schedules")

    @property
    def version_table_name(self) -> str:
        """Name of the Alembic version table; each results table has its own."""
        return _derive(self.table_name, "_version", _MAX_IDENTIFIER_BYTES - len(_VERSION_KEY))

    @property
    def queue_version_table_name(self) -> str:
        """Name of the Alembic version table of the broker's tables."""
        return _derive(self.table_name, "_queue_version", _MAX_IDENTIFIER_BYTES - len(_VERSION_KEY))

    @property
    def results_channel(self) -> str:
        """The channel for notifications of results.

        Without the schema, because one process may name it while another uses the search_path.
        """
        return _channel_of(self.table_name)

    @property
    def progress_channel(self) -> str:
        """The channel for notifications of progress."""
        return _channel_of(self.progress_table_name)

    @property
    def queue_channel(self) -> str:
        """The channel for notifications of sent tasks."""
        return _channel_of(self.queue_table_name)

    @property
    def finished_at_index_name(self) -> str:
        """The BRIN index on finished_at."""
        return _derive(self.table_name, "_finished_at_idx")

    @property
    def expires_at_index_name(self) -> str:
        """The partial b-tree index on expires_at."""
        return _derive(self.table_name, "_expires_at_idx")

    @property
    def available_at_index_name(self) -> str:
        """The index that orders the tasks of a queue for workers."""
        return _derive(self.queue_table_name, "_available_at_idx")

    @property
    def table_names(self) -> tuple[str, str, str, str]:
        """Names of the backend's tables, without the version table."""
        return (
            self.table_name,
            self.progress_table_name,
            self.status_table_name,
            self.workers_table_name,
        )

    @property
    def queue_table_names(self) -> tuple[str, str]:
        """Names of the broker's tables, without the version table."""
        return self.queue_table_name, self.schedules_table_name

    @property
    def derived_names(self) -> tuple[str, ...]:
        """All names that derive from table_name."""
        return (
            self.progress_table_name,
            self.status_table_name,
            self.workers_table_name,
            self.version_table_name,
            self.version_table_name + _VERSION_KEY,
            *self.queue_table_names,
            self.queue_version_table_name,
            self.queue_version_table_name + _VERSION_KEY,
            *map(primary_key_name, (*self.table_names, *self.queue_table_names)),
            self.finished_at_index_name,
            self.expires_at_index_name,
            self.available_at_index_name,
        )

    def partition_name(self, suffix: str) -> str:
        """Name of a partition of the results table."""
        return _derive(self.table_name, f"_{suffix}")

    @property
    def qualified_name(self) -> str:
        """The results table as shown in messages; not quoted, not for SQL."""
        return self.qualified(self.table_name)

    def qualified(self, table_name: str) -> str:
        """One of the tables as shown in messages."""
        return table_name if self.schema is None else f"{self.schema}.{table_name}"

    def to_column_task_id(self, task_id: str | uuid.UUID) -> Any:
        """The task id as the column stores it: a plain str, or a uuid.UUID for "Uuid".

        Raises:
            InvalidTaskIdError: The column cannot store this id.
        """
        if self.field_for_task_id == "Uuid":
            if isinstance(task_id, uuid.UUID):
                return uuid.UUID(int=task_id.int)  # asyncpg has its own subclass
            try:
                return uuid.UUID(task_id)
            except (ValueError, AttributeError, TypeError):
                raise InvalidTaskIdError(
                    task_id,
                    "is not a UUID, and the table is configured with "
                    'field_for_task_id="Uuid"; "VarChar" and "Text" accept any id',
                ) from None
        if type(task_id) is not str:
            if not isinstance(task_id, str):
                given: object = task_id  # of any type
                remedy = ": pass str(task_id)" if isinstance(given, uuid.UUID) else ""
                reason = f"is not a str but {type(given).__qualname__}{remedy}"
                raise InvalidTaskIdError(task_id, reason)
            task_id = str.__str__(task_id)  # a subclass, such as an Enum, may override __str__
        if len(task_id) <= _MAX_TASK_ID_BYTES and task_id.isascii() and "\x00" not in task_id:
            return task_id  # fast path for nearly every id
        flaw = flaw_of_key(task_id)
        if flaw:
            raise InvalidTaskIdError(shortened(task_id), flaw)
        return task_id


def flaw_of_key(key: str) -> str | None:
    """Why a text primary key cannot store this value; None if it can."""
    flaw = _flaw_of_text(key)
    if flaw:
        return f"{flaw}, which PostgreSQL cannot store"
    if len(key.encode()) > _MAX_TASK_ID_BYTES:
        return (
            f"is longer than the {_MAX_TASK_ID_BYTES} bytes that fit into the primary key's index"
        )
    return None


def shortened(key: str) -> str:
    """A key of any length, shortened for messages."""
    return key if len(key) <= _MAX_TASK_ID_BYTES // 4 else f"{key[:50]}..."


def primary_key_name(table_name: str) -> str:
    """Name of a table's primary key."""
    return _derive(table_name, "_pkey")


def _derive(name: str, suffix: str, most: int = _MAX_IDENTIFIER_BYTES) -> str:
    """The name with a suffix; if that is too long, a hash replaces the end of the name."""
    derived = name + suffix
    if len(derived.encode()) <= most:
        return derived
    # Before the suffix, so that names with different suffixes stay different.
    end = f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}{suffix}"
    return name.encode()[: most - len(end)].decode(errors="ignore") + end


def _channel_of(table_name: str) -> str:
    # With a prefix: channels are database-wide, and another package may use the plain name.
    channel = f"taskiq_sa_pg.{table_name}"
    if len(channel.encode()) <= _MAX_IDENTIFIER_BYTES:
        return channel
    return f"taskiq_sa_pg.{hashlib.sha256(table_name.encode()).hexdigest()[:40]}"


def _check_choice(parameter: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        accepted = ", ".join(f'"{choice}"' for choice in choices)
        raise ConfigurationError(f"{parameter} must be one of {accepted}, not {value!r}")


def _check_identifier(what: str, name: object) -> None:
    if not isinstance(name, str):
        raise ConfigurationError(f"{what} must be a str, not {name!r}")
    if not name:
        raise ConfigurationError(f"{what} must not be empty")
    flaw = _flaw_of_text(name)
    if flaw:
        raise ConfigurationError(f"{what} {flaw}, which PostgreSQL cannot store: {name!r}")
    size = len(name.encode())
    if size > _MAX_IDENTIFIER_BYTES:
        raise ConfigurationError(
            f"{what} is {size} bytes long in UTF-8, and PostgreSQL truncates names to "
            f"{_MAX_IDENTIFIER_BYTES}: {name!r}. Choose a shorter name"
        )


def _flaw_of_text(text: str) -> str | None:
    """Why PostgreSQL cannot store this text as UTF-8; None if it can."""
    if "\x00" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate"
    return None
