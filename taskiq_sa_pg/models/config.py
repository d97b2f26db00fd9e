"""TableConfig: what the results table is called and made of, with every check of names and ids."""

import hashlib
import uuid
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from taskiq_sa_pg.exceptions import ConfigurationError, InvalidTaskIdError

TaskIdField = Literal["VarChar", "Text", "Uuid"]
PayloadField = Literal["Bytea", "Jsonb"]

DEFAULT_TABLE_NAME: Final = "taskiq_results"

# NAMEDATALEN - 1: PostgreSQL cuts longer identifiers in silence.
_MAX_IDENTIFIER_BYTES: Final = 63

# Alembic's name for the version table's primary key is its own and this.
_VERSION_KEY: Final = "_pkc"

# A third of a b-tree's page, without the headers of tuple and value. A text that compresses well
# could be longer, but nobody can tell beforehand.
_MAX_TASK_ID_BYTES: Final = 2_692


@dataclass(frozen=True, slots=True)
class TableConfig:
    """Names and column types of one results table and the tables that go with it.

    Attributes:
        table_name: The results table, to the letter and without its schema. Every other name
            derives from it; one of more than 63 bytes is cut, and has a hash where it was.
        field_for_task_id: Type of the task-id column: VARCHAR, TEXT or UUID.
        field_for_payload: Type of the serialized values' columns: BYTEA or JSONB.
        schema: PostgreSQL schema of the tables; None leaves it to the search_path.

    Raises:
        ConfigurationError: A name that PostgreSQL cannot hold whole or that has a dot, or an
            unknown type.
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
                f"table_name must not have a dot: {self.table_name!r}. Give the schema by itself: "
                f"schema={schema!r}, table_name={name!r}"
            )
        if self.schema is not None:
            _check_identifier("schema", self.schema)

    @property
    def progress_table_name(self) -> str:
        """The progress table."""
        return _derive(self.table_name, "_progress")

    @property
    def status_table_name(self) -> str:
        """The table of tasks that have not finished."""
        return _derive(self.table_name, "_status")

    @property
    def workers_table_name(self) -> str:
        """The table of worker processes."""
        return _derive(self.table_name, "_workers")

    @property
    def queue_table_name(self) -> str:
        """The broker's table of tasks that have been sent and not finished."""
        return _derive(self.table_name, "_queue")

    @property
    def schedules_table_name(self) -> str:
        """The broker's table of schedules."""
        return _derive(self.table_name, "_schedules")

    @property
    def version_table_name(self) -> str:
        """The Alembic version table; each results table has its own."""
        return _derive(self.table_name, "_version", _MAX_IDENTIFIER_BYTES - len(_VERSION_KEY))

    @property
    def queue_version_table_name(self) -> str:
        """The Alembic version table of the broker's tables."""
        return _derive(self.table_name, "_queue_version", _MAX_IDENTIFIER_BYTES - len(_VERSION_KEY))

    @property
    def results_channel(self) -> str:
        """Where notifications tell of results.

        Without the schema: one process may leave it to the search_path and another name it.
        """
        return _channel_of(self.table_name)

    @property
    def progress_channel(self) -> str:
        """Where notifications tell of progress."""
        return _channel_of(self.progress_table_name)

    @property
    def queue_channel(self) -> str:
        """Where notifications tell of tasks that were sent."""
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
        """The index in whose order the queue's tasks are claimed."""
        return _derive(self.queue_table_name, "_available_at_idx")

    @property
    def table_names(self) -> tuple[str, str, str, str]:
        """The tables of results, without their version table."""
        return (
            self.table_name,
            self.progress_table_name,
            self.status_table_name,
            self.workers_table_name,
        )

    @property
    def queue_table_names(self) -> tuple[str, str]:
        """The tables of the broker, without their version table."""
        return self.queue_table_name, self.schedules_table_name

    @property
    def derived_names(self) -> tuple[str, ...]:
        """Every name that is made from table_name."""
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
        """A partition of the results table."""
        return _derive(self.table_name, f"_{suffix}")

    @property
    def qualified_name(self) -> str:
        """The results table as messages name it; not quoted, not for SQL."""
        return self.qualified(self.table_name)

    def qualified(self, table_name: str) -> str:
        """One of the tables as messages name it."""
        return table_name if self.schema is None else f"{self.schema}.{table_name}"

    def to_column_task_id(self, task_id: str | uuid.UUID) -> Any:
        """The task id as the column stores it: a plain str, or a uuid.UUID for "Uuid".

        Raises:
            InvalidTaskIdError: The column cannot hold this id.
        """
        if self.field_for_task_id == "Uuid":
            if isinstance(task_id, uuid.UUID):
                return uuid.UUID(int=task_id.int)  # asyncpg has a class of its own
            try:
                return uuid.UUID(task_id)
            except (ValueError, AttributeError, TypeError):
                raise InvalidTaskIdError(
                    task_id,
                    "is not a UUID, and the table was configured with "
                    'field_for_task_id="Uuid"; "VarChar" and "Text" hold any id',
                ) from None
        if type(task_id) is not str:
            if not isinstance(task_id, str):
                given: object = task_id  # which is anything
                remedy = ": pass str(task_id)" if isinstance(given, uuid.UUID) else ""
                reason = f"is not a str but {type(given).__qualname__}{remedy}"
                raise InvalidTaskIdError(task_id, reason)
            task_id = str.__str__(task_id)  # past a __str__ of its own, such as that of an Enum
        if len(task_id) <= _MAX_TASK_ID_BYTES and task_id.isascii() and "\x00" not in task_id:
            return task_id  # nearly every id, on the way of every call
        flaw = flaw_of_key(task_id)
        if flaw:
            raise InvalidTaskIdError(shortened(task_id), flaw)
        return task_id


def flaw_of_key(key: str) -> str | None:
    """Why a primary key of text cannot hold this one; None when it can."""
    flaw = _flaw_of_text(key)
    if flaw:
        return f"{flaw}, which PostgreSQL cannot store"
    if len(key.encode()) > _MAX_TASK_ID_BYTES:
        return (
            f"is longer than the {_MAX_TASK_ID_BYTES} bytes that fit into the primary key's index"
        )
    return None


def shortened(key: str) -> str:
    """A key as messages name it, which may be of any length."""
    return key if len(key) <= _MAX_TASK_ID_BYTES // 4 else f"{key[:50]}..."


def primary_key_name(table_name: str) -> str:
    """The primary key of any of the tables."""
    return _derive(table_name, "_pkey")


def _derive(name: str, suffix: str, most: int = _MAX_IDENTIFIER_BYTES) -> str:
    """The name with a suffix; where that is too long, a hash of the name replaces its end."""
    derived = name + suffix
    if len(derived.encode()) <= most:
        return derived
    # Before the suffix, so that what derives from one name cannot become the same.
    end = f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}{suffix}"
    return name.encode()[: most - len(end)].decode(errors="ignore") + end


def _channel_of(table_name: str) -> str:
    # With a prefix: a channel is the whole database's, and a plain name may be another package's.
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
            f"{what} is {size} bytes long in UTF-8, and PostgreSQL cuts names at "
            f"{_MAX_IDENTIFIER_BYTES}: {name!r}. Choose a shorter one"
        )


def _flaw_of_text(text: str) -> str | None:
    """Why PostgreSQL's UTF-8 cannot hold this text; None when it can."""
    if "\x00" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate"
    return None
