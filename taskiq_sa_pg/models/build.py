"""The declarative models of one configuration, and build_models(), which makes them."""

from collections.abc import Iterator
from dataclasses import dataclass
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
        Result: The results' model; `select(models.Result)` reads them like any other rows.
        Progress: The progress rows' model.
        Status: The model of tasks that have not finished; None does without, and then no task
            can be tracked.
        Queue: The model of the tasks that SQLAlchemyBroker has sent; None where there is none.
        Schedule: The model of the schedules of SQLAlchemyScheduleSource; None where there is none.
        Worker: The model of worker processes; None does without, and then no worker is seen, and
            no task is known to be lost.

    Raises:
        ConfigurationError: The classes were not made from one TableConfig, or their tables
            are not the ones that it describes: another name, or a column of ours that is not
            there or of another type.
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
                    "leave __tablename__ to the mixin, and give __table_config__ the schema"
                )
            _require_columns_of(mixin, table, config)

    @property
    def config(self) -> TableConfig:
        """Names and types of the tables."""
        return self.Result.__table_config__

    @property
    def metadata(self) -> MetaData:
        """The MetaData that holds the tables, for `target_metadata` in an Alembic env.py."""
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
        """The tables of tasks beside that of results; their rows go when a result is deleted."""
        return [t for t in (self.progress_table, self.status_table) if t is not None]

    @property
    def own_columns(self) -> dict[str, Column[Any]]:
        """The application's own columns that a value can be given to, by attribute of Result.

        Not the attributes themselves: to ask for them configures all of the application's mappers,
        and some of their classes may not be there yet.
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
    # Their values go to the driver as they are, past the types of SQLAlchemy.
    for name, wanted in _columns_of(mixin, config):
        found = table.c.get(name)
        if found is None:
            raise ConfigurationError(
                f"table {table.fullname} has no column {name}: leave the columns of "
                f"{mixin.__name__} as they are, and give those of your own other attributes"
            )
        if not _is_alike(found.type, wanted):
            raise ConfigurationError(
                f"column {table.fullname}.{name} is {found.type!r} and must be {wanted!r}: leave "
                f"it to {mixin.__name__}; __table_config__ chooses the types"
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
    """Fresh declarative classes for one results table and the tables that go with it.

    Args:
        table_name: The results table; the others are `<table_name>_progress`,
            `<table_name>_status` and `<table_name>_workers`.
        field_for_task_id: Type of the task-id columns.
        field_for_payload: Type of return_value, error and meta.
        schema: PostgreSQL schema of the tables; None takes the metadata's, and where that has
            none, leaves it to the search_path.
        metadata: Your application's (`Base.metadata`), so that its autogenerate sees the
            tables; None makes one of their own.
        queue: Whether to make the models of SQLAlchemyBroker, too: Queue and Schedule, of
            `<table_name>_queue` and `<table_name>_schedules`.

    Returns:
        The classes. They are on a registry of their own; two calls never share a class.

    Raises:
        ConfigurationError: A name or type that cannot work, or a table that this metadata
            already has.
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
                "and use them wherever they are needed"
            )
    return Models(
        Result=_map("Result", ResultMixin, config, mapper_registry),
        Progress=_map("Progress", ProgressMixin, config, mapper_registry),
        Status=_map("Status", StatusMixin, config, mapper_registry),
        Worker=_map("Worker", WorkerMixin, config, mapper_registry),
        Queue=_map("Queue", QueueMixin, config, mapper_registry) if queue else None,
        Schedule=_map("Schedule", ScheduleMixin, config, mapper_registry) if queue else None,
    )


def _map(name: str, mixin: type[Any], config: TableConfig, mapper_registry: registry) -> type[Any]:
    return mapper_registry.mapped(type(name, (mixin,), {"__table_config__": config}))
