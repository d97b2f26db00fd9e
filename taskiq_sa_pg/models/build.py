"""The declarative models of one configuration, and build_models(), which builds them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Column, MetaData, Table, inspect
from sqlalchemy.orm import MappedColumn, declared_attr, registry
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.exceptions import ConfigurationError, check_flag
from taskiq_sa_pg.models.config import DEFAULT_TABLE_NAME, PayloadField, TableConfig, TaskIdField
from taskiq_sa_pg.models.mixins import (
    ProgressMixin,
    QueueMixin,
    ResultMixin,
    ScheduleMixin,
    StatusMixin,
    TableMixin,
    WorkerMixin,
    payload_type,
    task_id_type,
)


@dataclass(frozen=True, slots=True)
class Models:
    """The mapped classes of one configuration.

    Attributes:
        Result: The model of results, for queries such as `select(models.Result)`.
        Progress: The model of progress.
        Status: The model of unfinished tasks. None omits the table; then tasks cannot be tracked.
        Queue: The model of tasks that SQLAlchemyBroker has sent, or None.
        Schedule: The model of the schedules of SQLAlchemyScheduleSource, or None.
        Worker: The model of worker processes. None omits the table; then workers are not listed
            and lost tasks are not detected.

    Raises:
        ConfigurationError: The classes do not share one TableConfig, or a table does not match it:
            another name, a missing column, or a column of another type.
    """

    Result: type[ResultMixin]
    Progress: type[ProgressMixin]
    Status: type[StatusMixin] | None = None
    Queue: type[QueueMixin] | None = None
    Schedule: type[ScheduleMixin] | None = None
    Worker: type[WorkerMixin] | None = None

    def __post_init__(self) -> None:
        config = self.config
        described: list[tuple[type[Any] | None, type[Any], str]] = [
            (self.Result, ResultMixin, config.table_name),
            (self.Progress, ProgressMixin, config.progress_table_name),
            (self.Status, StatusMixin, config.status_table_name),
            (self.Worker, WorkerMixin, config.workers_table_name),
            (self.Queue, QueueMixin, config.queue_table_name),
            (self.Schedule, ScheduleMixin, config.schedules_table_name),
        ]
        for model, mixin, name in described:
            if model is None:
                continue
            if model.__table_config__ != config:
                raise ConfigurationError(
                    "all models must share one __table_config__, not "
                    f"{config} and {model.__table_config__}"
                )
            table = _table_of(model)
            if (table.schema, table.name) != (config.schema, name):
                raise ConfigurationError(
                    f"table {table.fullname} must be named {name} in schema {config.schema}: "
                    "do not set __tablename__, and set the schema in __table_config__"
                )
            _require_columns_of(mixin, table, config)

    @property
    def config(self) -> TableConfig:
        """Names and types of the tables."""
        return self.Result.__table_config__

    @property
    def metadata(self) -> MetaData:
        """The MetaData that contains the tables, for `target_metadata` in an Alembic env.py."""
        return self.results_table.metadata

    @property
    def results_table(self) -> Table:
        """The Core table of Result."""
        return _table_of(self.Result)

    @property
    def progress_table(self) -> Table:
        """The Core table of Progress."""
        return _table_of(self.Progress)

    @property
    def status_table(self) -> Table | None:
        """The Core table of Status."""
        return None if self.Status is None else _table_of(self.Status)

    @property
    def workers_table(self) -> Table | None:
        """The Core table of Worker."""
        return None if self.Worker is None else _table_of(self.Worker)

    @property
    def queue_table(self) -> Table | None:
        """The Core table of Queue."""
        return None if self.Queue is None else _table_of(self.Queue)

    @property
    def schedules_table(self) -> Table | None:
        """The Core table of Schedule."""
        return None if self.Schedule is None else _table_of(self.Schedule)

    @property
    def other_tables(self) -> list[Table]:
        """The progress and status tables; their rows are deleted together with the result."""
        return [t for t in (self.progress_table, self.status_table) if t is not None]

    @property
    def own_columns(self) -> dict[str, Column[Any]]:
        """The application's own writable columns, by attribute of Result.

        Not the attributes themselves: reading them configures all of the application's mappers,
        and some of their classes may not be imported yet.
        """
        ours = {name for name, _ in _columns_of(ResultMixin, self.config)}
        return {
            name: column
            for name, column in inspect(self.Result).columns.items()
            if isinstance(column, Column)
            and column.table is self.results_table
            and column.name not in ours
            and column.computed is None
            and not (column.identity is not None and column.identity.always)
        }


def _require_columns_of(mixin: type[Any], table: Table, config: TableConfig) -> None:
    # Their values are passed to the driver directly, without SQLAlchemy's types.
    for name, wanted in _columns_of(mixin, config):
        found = table.c.get(name)
        if found is None:
            raise ConfigurationError(
                f"table {table.fullname} has no column {name}: do not change the columns of "
                f"{mixin.__name__}, and use other attribute names for your own columns"
            )
        if not _is_alike(found.type, wanted):
            raise ConfigurationError(
                f"column {table.fullname}.{name} is {found.type!r} and must be {wanted!r}: do not "
                f"override it; {mixin.__name__} takes its types from __table_config__"
            )


def _is_alike(found: TypeEngine[Any], wanted: TypeEngine[Any]) -> bool:
    has_zone, wants_zone = (getattr(each, "timezone", None) for each in (found, wanted))
    return type(found) is type(wanted) and has_zone == wants_zone


def _columns_of(mixin: type[Any], config: TableConfig) -> Iterator[tuple[str, TypeEngine[Any]]]:
    if issubclass(mixin, TableMixin):
        yield "task_id", task_id_type(config.field_for_task_id)
    for name, value in vars(mixin).items():
        if isinstance(value, MappedColumn):
            yield name, value.column.type
        elif isinstance(value, declared_attr) and not name.startswith("__"):
            yield name, payload_type(config.field_for_payload)


def _table_of(model: type[Any]) -> Table:
    table: Table = model.__table__
    return table


def build_models(
    table_name: str = DEFAULT_TABLE_NAME,
    *,
    field_for_task_id: TaskIdField = "VarChar",
    field_for_payload: PayloadField = "Bytea",
    schema: str | None = None,
    metadata: MetaData | None = None,
    queue: bool = False,
) -> Models:
    """Builds new declarative classes for one results table and its related tables.

    Args:
        table_name: Name of the results table. The other tables are named `<table_name>_progress`,
            `<table_name>_status` and `<table_name>_workers`.
        field_for_task_id: Type of the task-id columns.
        field_for_payload: Type of return_value, error and meta.
        schema: PostgreSQL schema of the tables. None uses the schema of the metadata, or the
            search_path if that has none.
        metadata: Your application's MetaData (`Base.metadata`), so that autogenerate sees the
            tables. None creates a new one.
        queue: Whether to build the models of SQLAlchemyBroker, too: Queue and Schedule, for
            `<table_name>_queue` and `<table_name>_schedules`.

    Returns:
        The classes, in a separate registry. Two calls never share a class.

    Raises:
        ConfigurationError: A name or type is invalid, or the metadata already has such a table.
    """
    check_flag("queue", queue)
    if schema is None and metadata is not None:
        schema = metadata.schema
    config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
    mapper_registry = registry(metadata=metadata)
    tables = mapper_registry.metadata.tables.values()
    present = {(table.schema, table.name) for table in tables}
    for name in (*config.table_names, *(config.queue_table_names if queue else ())):
        if (schema, name) in present:
            raise ConfigurationError(
                f"the metadata already has a table {name!r}: build the models of a table once "
                "and reuse them"
            )
    return Models(
        Result=_map("Result", ResultMixin, config, mapper_registry),
        Progress=_map("Progress", ProgressMixin, config, mapper_registry),
        Status=_map("Status", StatusMixin, config, mapper_registry),
        Worker=_map("Worker", WorkerMixin, config, mapper_registry),
        Queue=_map("Queue", QueueMixin, config, mapper_registry) if queue else None,
        Schedule=_map("Schedule", ScheduleMixin, config, mapper_registry) if queue else None,
    )


def choose_models(models: Models | None, config: TableConfig, *, queue: bool = False) -> Models:
    """Returns the models of a backend or a broker: those given, or those that config describes.

    The models of one config are built once, because that takes longer than the rest of a backend.
    So find() accepts conditions on the models of another backend of the same tables.

    Raises:
        ConfigurationError: models is not a Models, or was built for another config.
    """
    if models is None:
        return _build_once(config, queue)
    if not isinstance(models, Models):
        raise ConfigurationError(f"models must be a Models, not {type(models).__qualname__}")
    if config not in {models.config, TableConfig()}:
        raise ConfigurationError(
            f"models were built for {models.config}, but the other arguments give {config}: pass "
            "names and types to the models only"
        )
    return models


@lru_cache
def _build_once(config: TableConfig, queue: bool) -> Models:
    return build_models(**asdict(config), queue=queue)


def _map(name: str, mixin: type[Any], config: TableConfig, mapper_registry: registry) -> type[Any]:
    return mapper_registry.mapped(type(name, (mixin,), {"__table_config__": config}))
