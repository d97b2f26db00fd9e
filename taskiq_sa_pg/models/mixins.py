"""The columns of the tables, as mixins for declarative classes."""

from datetime import UTC, datetime, timedelta
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
    PrimaryKeyConstraint,
    SmallInteger,
    SQLColumnExpression,
    String,
    Text,
    Uuid,
    column,
    false,
    func,
    literal_column,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, MappedColumn, declared_attr, mapped_column
from sqlalchemy.sql.elements import conv, quoted_name
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.models.config import PayloadField, TableConfig, TaskIdField, primary_key_name

# none_as_null: if an application writes None, it becomes SQL NULL and not JSON null.
_JSON: Final = JSONB(none_as_null=True)
_TIME: Final = DateTime(timezone=True)

_A_SECOND: Final = literal_column("interval '1 second'", Interval())

# Half-empty pages, and no index except the primary key, keep the frequent updates HOT.
# `postgresql_with` would be clearer, but needs SQLAlchemy 2.1.
HALF_FULL: Final = "heap WITH (fillfactor = 50)"

# Thousands of rows are inserted and deleted although few exist at a time. The default thresholds,
# a fraction of the table, would leave the dead rows to the next claims.
QUICKLY_VACUUMED: Final = (
    "heap WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, "
    "autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 1000, "
    "autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 1000)"
)

# Every search reads the pages that a BRIN index has not summarized. By default autovacuum does that
# only after a fifth of the table was inserted.
SOON_SUMMARIZED: Final = {"autosummarize": "on"}

DEFAULT_QUEUE: Final = "default"


def task_id_type(field: TaskIdField) -> TypeEngine[Any]:
    """The type of the task_id columns."""
    types: dict[str, type[TypeEngine[Any]]] = {"VarChar": String, "Text": Text, "Uuid": Uuid}
    return types[field]()


def payload_type(field: PayloadField) -> TypeEngine[Any]:
    """The type of the columns of serialized values."""
    return LargeBinary() if field == "Bytea" else _JSON


def quoted(name: str) -> quoted_name:
    """A name that is always quoted: new PostgreSQL releases add reserved words."""
    return quoted_name(name, quote=True)


def final(name: str) -> conv:
    """A name that the naming_convention of a MetaData does not change."""
    return conv(quoted(name))


def as_interval(seconds: SQLColumnExpression[float]) -> ColumnElement[timedelta]:
    """A number of seconds as PostgreSQL's INTERVAL."""
    return _A_SECOND.op("*", return_type=Interval())(seconds)


def _column(position: int, column_type: Any, **options: Any) -> MappedColumn[Any]:
    # Negative, so that columns of a subclass come after ours.
    return mapped_column(column_type, sort_order=position - 100, **options)


def _payload(cls: Any, position: int, *, nullable: bool) -> Mapped[Any]:
    column_type = payload_type(cls.__table_config__.field_for_payload)
    return _column(position, column_type, nullable=nullable)


class _ConfiguredMixin:
    """Common to all tables: a configuration and its schema."""

    __table_config__: ClassVar[TableConfig] = TableConfig()

    @classmethod
    def _table_args(cls: Any, *indexes: Index, key: str = "task_id", **options: Any) -> Any:
        config = cls.__table_config__
        schema = None if config.schema is None else quoted(config.schema)
        primary_key = PrimaryKeyConstraint(key, name=final(primary_key_name(cls.__tablename__)))
        return primary_key, *indexes, {"schema": schema, **options}


class TableMixin(_ConfiguredMixin):
    """Common to the tables of tasks: the task id as primary key."""

    @declared_attr
    def task_id(cls) -> Mapped[Any]:
        """A str, or a uuid.UUID if the column type is UUID."""
        return _column(0, task_id_type(cls.__table_config__.field_for_task_id))

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        args: tuple[Any, ...] = cls._table_args(postgresql_using=HALF_FULL)
        return args


class ResultMixin(TableMixin):
    """The columns and indexes of a results table.

    Subclass it together with your own Base to add columns. `__table_config__` sets the names and
    types of the table; nothing else is required:

        class Result(ResultMixin, Base):
            __table_config__ = TableConfig(table_name="results")
            tenant: Mapped[str | None]
    """

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return quoted(cls.__table_config__.table_name)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        config = cls.__table_config__
        is_set = column("expires_at").is_not(None)
        args: tuple[Any, ...] = cls._table_args(
            Index(
                final(config.finished_at_index_name),
                "finished_at",
                postgresql_using="brin",
                postgresql_with=SOON_SUMMARIZED,
            ),
            Index(final(config.expires_at_index_name), "expires_at", postgresql_where=is_set),
        )
        return args

    is_err: Mapped[bool] = _column(1, Boolean)

    @declared_attr
    def return_value(cls) -> Mapped[Any]:
        """The serialized return value: bytes, or JSON if the column type is JSONB."""
        return _payload(cls, 2, nullable=False)

    @declared_attr
    def error(cls) -> Mapped[Any]:
        """The serialized exception, or None."""
        return _payload(cls, 3, nullable=True)

    error_type: Mapped[str | None] = _column(4, Text)
    traceback: Mapped[str | None] = _column(5, Text)
    execution_time: Mapped[float] = _column(6, Double)
    labels: Mapped[dict[str, Any]] = _column(7, JSONB)
    log: Mapped[str | None] = _column(8, Text)
    task_name: Mapped[str | None] = _column(9, Text)
    attempt: Mapped[int] = _column(10, Integer, default=0, server_default=text("0"))
    finished_at: Mapped[datetime] = _column(11, _TIME, server_default=func.now())
    expires_at: Mapped[datetime | None] = _column(12, _TIME)
    args: Mapped[list[Any] | None] = _column(13, _JSON)
    kwargs: Mapped[dict[str, Any] | None] = _column(14, _JSON)
    worker: Mapped[str | None] = _column(15, Text)
    queued_at: Mapped[datetime | None] = _column(16, _TIME)
    started_at: Mapped[datetime | None] = _column(17, _TIME)

    @hybrid_property
    def is_expired(self) -> bool:
        """Whether it has expired; in SQL by the database's clock, in Python by the local clock."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)

    @is_expired.inplace.expression
    @classmethod
    def _is_expired(cls) -> ColumnElement[bool]:
        # Never NULL, so that ~is_expired also matches results that are kept for ever.
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
        """Time from queued_at to started_at; None unless both are recorded."""
        if self.started_at is None or self.queued_at is None:
            return None
        return self.started_at - self.queued_at

    @waited.inplace.expression
    @classmethod
    def _waited(cls) -> ColumnElement[timedelta | None]:
        return type_coerce(cls.started_at - cls.queued_at, Interval())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, is_err={self.is_err!r})"


class ProgressMixin(TableMixin):
    """The columns of a progress table; subclass it like ResultMixin."""

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return quoted(cls.__table_config__.progress_table_name)

    state: Mapped[str] = _column(1, Text)

    @declared_attr
    def meta(cls) -> Mapped[Any]:
        """The serialized metadata of the progress, or None."""
        return _payload(cls, 2, nullable=True)

    updated_at: Mapped[datetime] = _column(3, _TIME, server_default=func.now())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, state={self.state!r})"


class StatusMixin(TableMixin):
    """The columns of a status table; subclass it like ResultMixin."""

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return quoted(cls.__table_config__.status_table_name)

    state: Mapped[str] = _column(1, Text)
    task_name: Mapped[str | None] = _column(2, Text)
    attempt: Mapped[int] = _column(3, Integer, default=0, server_default=text("0"))
    queued_at: Mapped[datetime | None] = _column(4, _TIME)
    started_at: Mapped[datetime | None] = _column(5, _TIME)
    worker: Mapped[str | None] = _column(6, Text)
    updated_at: Mapped[datetime] = _column(7, _TIME, server_default=func.now())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, state={self.state!r})"


class WorkerMixin(_ConfiguredMixin):
    """The columns of the table of worker processes; subclass it like ResultMixin.

    Each process that executes tasks has a row while it runs. `started_at` is when it started, and
    `seen_at` the time of its last heartbeat, both by the database's clock.
    """

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return quoted(cls.__table_config__.workers_table_name)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        args: tuple[Any, ...] = cls._table_args(key="worker", postgresql_using=HALF_FULL)
        return args

    worker: Mapped[str] = _column(0, Text)
    started_at: Mapped[datetime] = _column(1, _TIME, server_default=func.now())
    seen_at: Mapped[datetime] = _column(2, _TIME, server_default=func.now())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(worker={self.worker!r}, seen_at={self.seen_at!r})"


class QueueMixin(TableMixin):
    """The columns and the index of the broker's queue; subclass it like ResultMixin.

    A row is a task that was sent and is not acknowledged. `available_at` is when a worker may
    claim it: the end of its delay, the end of the lease if a worker has it, or infinity if it is
    parked.
    """

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return quoted(cls.__table_config__.queue_table_name)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        name = final(cls.__table_config__.available_at_index_name)
        index = Index(name, "queue_name", column("priority").desc(), "available_at")
        args: tuple[Any, ...] = cls._table_args(index, postgresql_using=QUICKLY_VACUUMED)
        return args

    queue_name: Mapped[str] = _column(1, Text, server_default=text(f"'{DEFAULT_QUEUE}'"))
    priority: Mapped[int] = _column(2, SmallInteger, server_default=text("0"))
    available_at: Mapped[datetime] = _column(3, _TIME, server_default=func.now())
    claim: Mapped[int] = _column(4, Integer, server_default=text("0"))
    deliveries: Mapped[int] = _column(5, SmallInteger, server_default=text("0"))
    worker: Mapped[str | None] = _column(6, Text)
    task_name: Mapped[str] = _column(7, Text)
    message: Mapped[bytes] = _column(8, LargeBinary)
    queued_at: Mapped[datetime] = _column(9, _TIME, server_default=func.now())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, task_name={self.task_name!r})"


class ScheduleMixin(_ConfiguredMixin):
    """The columns of the table of schedules; subclass it like ResultMixin.

    `cron`, `interval` or `time` defines when the task is sent; `last_tick` is when it was last
    due. A schedule from a task's labels has `is_labelled` set, and is deleted when the labels no
    longer contain it.
    """

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return quoted(cls.__table_config__.schedules_table_name)

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        args: tuple[Any, ...] = cls._table_args(key="schedule_id", postgresql_using=HALF_FULL)
        return args

    schedule_id: Mapped[str] = _column(0, Text)
    task_name: Mapped[str] = _column(1, Text)
    cron: Mapped[str | None] = _column(2, Text)
    interval: Mapped[timedelta | None] = _column(3, Interval)
    time: Mapped[datetime | None] = _column(4, _TIME)
    message: Mapped[bytes] = _column(5, LargeBinary)
    last_tick: Mapped[datetime | None] = _column(6, _TIME)
    created_at: Mapped[datetime] = _column(7, _TIME, server_default=func.now())
    is_labelled: Mapped[bool] = _column(8, Boolean, server_default=false())

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(schedule_id={self.schedule_id!r}, task_name={self.task_name!r})"
