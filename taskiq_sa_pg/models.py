"""The declarative models: column mixins, and build_models(), which makes classes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, ClassVar, Final

from sqlalchemy import (
    Boolean,
    ColumnElement,
    DateTime,
    Double,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SQLColumnExpression,
    Table,
    Text,
    Uuid,
    column,
    func,
    literal_column,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, MappedColumn, declared_attr, mapped_column, registry
from sqlalchemy.sql.elements import conv, quoted_name
from sqlalchemy.types import String, TypeEngine

from taskiq_sa_pg.config import (
    DEFAULT_TABLE_NAME,
    PayloadField,
    TableConfig,
    TaskIdField,
)
from taskiq_sa_pg.exceptions import ConfigurationError

# Marks the columns that TaskMetadataMiddleware fills: a model may have others of these names, which
# are older than ours.
METADATA: Final[Mapping[str, Any]] = MappingProxyType({"taskiq_sa_pg": "metadata"})

_A_SECOND: Final = literal_column("interval '1 second'", Interval())

# Negative, so that the columns which a subclass adds follow ours.
_FIRST = -100


def _task_id_type(field: TaskIdField) -> TypeEngine[Any]:
    types: dict[TaskIdField, TypeEngine[Any]] = {
        "VarChar": String(),
        "Text": Text(),
        "Uuid": Uuid(),
    }
    return types[field]


def _payload_type(field: PayloadField) -> TypeEngine[Any]:
    # none_as_null: a None that an application writes itself is SQL's NULL and not JSON's null.
    return LargeBinary() if field == "Bytea" else JSONB(none_as_null=True)


def _quoted(name: str) -> quoted_name:
    # Always quoted: the list of reserved words grows from one PostgreSQL to the next.
    return quoted_name(name, quote=True)


def _final(name: str) -> conv:
    # Beyond the reach of the metadata's naming_convention, which may rewrite given names too.
    return conv(_quoted(name))


def as_interval(seconds: SQLColumnExpression[float]) -> ColumnElement[timedelta]:
    """A number of seconds as PostgreSQL's INTERVAL."""
    return _A_SECOND.op("*", return_type=Interval())(seconds)


class ResultMixin:
    """The columns and indexes of a results table.

    Subclass it beside your own Base to add columns; `__table_config__` says which types and
    names the table has, and nothing else has to be set:

        class Result(ResultMixin, Base):
            __table_config__ = TableConfig(table_name="results")
            tenant: Mapped[str | None]
    """

    __table_config__: ClassVar[TableConfig] = TableConfig()

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return _quoted(cls.__table_config__.table_name)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        config = cls.__table_config__
        return (
            PrimaryKeyConstraint("task_id", name=_final(config.primary_key_name)),
            Index(
                _final(config.finished_at_index_name),
                "finished_at",
                postgresql_using="brin",
            ),
            Index(
                _final(config.expires_at_index_name),
                "expires_at",
                postgresql_where=column("expires_at").is_not(None),
            ),
            _table_options(config),
        )

    @declared_attr
    def task_id(cls) -> Mapped[Any]:
        """A str, or a uuid.UUID where the column is UUID."""
        column_type = _task_id_type(cls.__table_config__.field_for_task_id)
        return mapped_column(column_type, sort_order=_FIRST)

    is_err: Mapped[bool] = mapped_column(Boolean, sort_order=_FIRST + 1)

    @declared_attr
    def return_value(cls) -> Mapped[Any]:
        """The serialized return value: bytes, or JSON where the column is JSONB."""
        column_type = _payload_type(cls.__table_config__.field_for_payload)
        return mapped_column(column_type, nullable=False, sort_order=_FIRST + 2)

    @declared_attr
    def error(cls) -> Mapped[Any]:
        """The serialized exception, or None."""
        column_type = _payload_type(cls.__table_config__.field_for_payload)
        return mapped_column(column_type, nullable=True, sort_order=_FIRST + 3)

    error_type: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 4)
    traceback: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 5)
    execution_time: Mapped[float] = mapped_column(Double, sort_order=_FIRST + 6)
    labels: Mapped[dict[str, Any]] = mapped_column(JSONB, sort_order=_FIRST + 7)
    log: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 8)
    task_name: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 9)
    attempt: Mapped[int] = mapped_column(
        Integer, default=0, server_default=text("0"), sort_order=_FIRST + 10
    )
    finished_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now(), sort_order=_FIRST + 11
    )
    expires_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), sort_order=_FIRST + 12
    )
    args: Mapped[list[Any] | None] = mapped_column(
        JSONB(none_as_null=True), sort_order=_FIRST + 13, info=dict(METADATA)
    )
    kwargs: Mapped[dict[str, Any] | None] = mapped_column(
        JSONB(none_as_null=True), sort_order=_FIRST + 14, info=dict(METADATA)
    )
    worker: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 15, info=dict(METADATA))
    queued_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), sort_order=_FIRST + 16, info=dict(METADATA)
    )
    started_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), sort_order=_FIRST + 17, info=dict(METADATA)
    )

    @hybrid_property
    def is_expired(self) -> bool:
        """Whether it is missing for every read; in SQL by the database's clock, else by ours."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)

    @is_expired.inplace.expression
    @classmethod
    def _is_expired(cls) -> ColumnElement[bool]:
        # Never NULL, so that ~is_expired finds those that are kept for ever.
        return cls.expires_at.is_not(None) & (cls.expires_at <= func.now())

    @hybrid_property
    def duration(self) -> timedelta:
        """execution_time as a timedelta; in SQL as an INTERVAL."""
        return timedelta(seconds=self.execution_time)

    @duration.inplace.expression
    @classmethod
    def _duration(cls) -> ColumnElement[timedelta]:
        return as_interval(cls.execution_time)

    @hybrid_property
    def waited(self) -> timedelta | None:
        """From queued_at to started_at; None where TaskMetadataMiddleware did not see both."""
        if self.started_at is None or self.queued_at is None:
            return None
        return self.started_at - self.queued_at

    @waited.inplace.expression
    @classmethod
    def _waited(cls) -> ColumnElement[timedelta | None]:
        return type_coerce(cls.started_at - cls.queued_at, Interval())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, is_err={self.is_err!r})"


class ProgressMixin:
    """The columns of a progress table; subclass it as you subclass ResultMixin."""

    __table_config__: ClassVar[TableConfig] = TableConfig()

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return _quoted(cls.__table_config__.progress_table_name)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        config = cls.__table_config__
        return (
            PrimaryKeyConstraint("task_id", name=_final(config.progress_primary_key_name)),
            # Half-empty pages and no further index keep the frequent updates HOT.
            # `postgresql_with` would say it better, and came with SQLAlchemy 2.1.
            _table_options(config, postgresql_using="heap WITH (fillfactor = 50)"),
        )

    @declared_attr
    def task_id(cls) -> Mapped[Any]:
        """A str, or a uuid.UUID where the column is UUID."""
        column_type = _task_id_type(cls.__table_config__.field_for_task_id)
        return mapped_column(column_type, sort_order=_FIRST)

    state: Mapped[str] = mapped_column(Text, sort_order=_FIRST + 1)

    @declared_attr
    def meta(cls) -> Mapped[Any]:
        """The serialized metadata of the progress, or None."""
        column_type = _payload_type(cls.__table_config__.field_for_payload)
        return mapped_column(column_type, nullable=True, sort_order=_FIRST + 2)

    updated_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now(), sort_order=_FIRST + 3
    )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, state={self.state!r})"


class StatusMixin:
    """The columns of a status table; subclass it as you subclass ResultMixin."""

    __table_config__: ClassVar[TableConfig] = TableConfig()

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return _quoted(cls.__table_config__.status_table_name)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        config = cls.__table_config__
        return (
            PrimaryKeyConstraint("task_id", name=_final(config.status_primary_key_name)),
            # As in ProgressMixin.
            _table_options(config, postgresql_using="heap WITH (fillfactor = 50)"),
        )

    @declared_attr
    def task_id(cls) -> Mapped[Any]:
        """A str, or a uuid.UUID where the column is UUID."""
        column_type = _task_id_type(cls.__table_config__.field_for_task_id)
        return mapped_column(column_type, sort_order=_FIRST)

    state: Mapped[str] = mapped_column(Text, sort_order=_FIRST + 1)
    task_name: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 2)
    attempt: Mapped[int] = mapped_column(
        Integer, default=0, server_default=text("0"), sort_order=_FIRST + 3
    )
    queued_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), sort_order=_FIRST + 4
    )
    started_at: Mapped[datetime | None] = mapped_column(
        DateTime(timezone=True), sort_order=_FIRST + 5
    )
    worker: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 6)
    updated_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now(), sort_order=_FIRST + 7
    )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, state={self.state!r})"


def _table_options(config: TableConfig, **options: Any) -> dict[str, Any]:
    schema = None if config.schema is None else _quoted(config.schema)
    return {"schema": schema, **options}


@dataclass(frozen=True, slots=True)
class Models:
    """The mapped classes of one configuration.

    Attributes:
        Result: The results' model; `select(models.Result)` reads them like any other rows.
        Progress: The progress rows' model.
        Status: The model of tasks that have not finished; None does without, and then no task
            can be tracked.

    Raises:
        ConfigurationError: The classes were not made from one TableConfig, or their tables
            are not the ones that it describes: another name, a column that is not there, or a
            task id or serialized value of another type.
    """

    Result: type[ResultMixin]
    Progress: type[ProgressMixin]
    Status: type[StatusMixin] | None = None

    def __post_init__(self) -> None:
        config = self.config
        given: list[tuple[type[Any], type[Any], str]] = [
            (self.Result, ResultMixin, config.table_name),
            (self.Progress, ProgressMixin, config.progress_table_name),
        ]
        if self.Status is not None:
            given.append((self.Status, StatusMixin, config.status_table_name))
        for model, mixin, name in given:
            if model.__table_config__ != config:
                raise ConfigurationError(
                    "Result, Progress and Status must share one __table_config__, not "
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


def _require_columns_of(mixin: type[Any], table: Table, config: TableConfig) -> None:
    # Of these columns values go to the driver as they are, past the types of SQLAlchemy.
    payload = _payload_type(config.field_for_payload)
    types = {"task_id": _task_id_type(config.field_for_task_id)}
    types |= dict.fromkeys(("return_value", "error", "meta"), payload)
    for name in _columns_of(mixin):
        if name not in table.c:
            raise ConfigurationError(
                f"table {table.fullname} has no column {name}: leave the columns of "
                f"{mixin.__name__} as they are, and give those of your own other attributes"
            )
        wanted, found = types.get(name), table.c[name].type
        if wanted is not None and type(found) is not type(wanted):
            raise ConfigurationError(
                f"column {table.fullname}.{name} is {found!r} and must be {wanted!r}: leave it to "
                f"{mixin.__name__}; __table_config__ chooses the types"
            )


def _columns_of(mixin: type[Any]) -> list[str]:
    return [
        name
        for name, value in vars(mixin).items()
        if isinstance(value, (declared_attr, MappedColumn)) and not name.startswith("__")
    ]


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
) -> Models:
    """Fresh declarative classes for one results table and the tables that go with it.

    Args:
        table_name: The results table; the others are `<table_name>_progress` and
            `<table_name>_status`.
        field_for_task_id: Type of the task-id columns.
        field_for_payload: Type of return_value, error and meta.
        schema: PostgreSQL schema of the tables; None takes the metadata's, and where that has
            none, leaves it to the search_path.
        metadata: Your application's (`Base.metadata`), so that its autogenerate sees the
            tables; None makes one of their own.

    Returns:
        The classes. They are on a registry of their own; two calls never share a class.

    Raises:
        ConfigurationError: A name or type that cannot work, or a table that this metadata
            already has.
    """
    if schema is None and metadata is not None:
        schema = metadata.schema
    config = TableConfig(table_name, field_for_task_id, field_for_payload, schema)
    mapper_registry = registry(metadata=metadata)
    _refuse_tables_again(mapper_registry.metadata, config)
    return Models(
        Result=_map("Result", ResultMixin, config, mapper_registry),
        Progress=_map("Progress", ProgressMixin, config, mapper_registry),
        Status=_map("Status", StatusMixin, config, mapper_registry),
    )


def _refuse_tables_again(metadata: MetaData, config: TableConfig) -> None:
    present = {(table.schema, table.name) for table in metadata.tables.values()}
    for name in config.table_names:
        if (config.schema, name) in present:
            raise ConfigurationError(
                f"the metadata already has a table {name!r}: build the models of a table once "
                "and use them wherever they are needed"
            )


def _map(name: str, mixin: type[Any], config: TableConfig, mapper_registry: registry) -> type[Any]:
    return mapper_registry.mapped(type(name, (mixin,), {"__table_config__": config}))
