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
    SQLColumnExpression,
    String,
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
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.sql.elements import conv, quoted_name
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.models.config import PayloadField, TableConfig, TaskIdField, primary_key_name

_A_SECOND: Final = literal_column("interval '1 second'", Interval())

# Negative, so that the columns which a subclass adds follow ours.
_FIRST = -100

# Half-empty pages and no index beside the key keep the frequent updates HOT. `postgresql_with`
# would say it better, and came with SQLAlchemy 2.1.
HALF_FULL: Final = "heap WITH (fillfactor = 50)"

_TASK_ID_TYPES: Final[dict[TaskIdField, type[TypeEngine[Any]]]] = {
    "VarChar": String,
    "Text": Text,
    "Uuid": Uuid,
}


def task_id_type(field: TaskIdField) -> TypeEngine[Any]:
    """The type of the columns task_id."""
    return _TASK_ID_TYPES[field]()


def payload_type(field: PayloadField) -> TypeEngine[Any]:
    """The type of the columns with serialized values."""
    # none_as_null: a None that an application writes itself is SQL's NULL and not JSON's null.
    return LargeBinary() if field == "Bytea" else JSONB(none_as_null=True)


def quoted(name: str) -> quoted_name:
    """A name that is always quoted: PostgreSQL's reserved words grow with its releases."""
    return quoted_name(name, quote=True)


def final(name: str) -> conv:
    """A name that the MetaData's naming_convention, which may rewrite given ones, leaves alone."""
    return conv(quoted(name))


def as_interval(seconds: SQLColumnExpression[float]) -> ColumnElement[timedelta]:
    """A number of seconds as PostgreSQL's INTERVAL."""
    return _A_SECOND.op("*", return_type=Interval())(seconds)


def _time(position: int) -> Any:
    return mapped_column(DateTime(timezone=True), sort_order=_FIRST + position)


def _stamp(position: int) -> Any:
    return mapped_column(
        DateTime(timezone=True), server_default=func.now(), sort_order=_FIRST + position
    )


def _json(position: int) -> Any:
    return mapped_column(JSONB(none_as_null=True), sort_order=_FIRST + position)


def _payload(cls: Any, position: int, *, nullable: bool) -> Mapped[Any]:
    column_type = payload_type(cls.__table_config__.field_for_payload)
    return mapped_column(column_type, nullable=nullable, sort_order=_FIRST + position)


class TableMixin:
    """What the three tables share: a configuration, and the task id as their primary key."""

    __table_config__: ClassVar[TableConfig] = TableConfig()

    @declared_attr
    def task_id(cls) -> Mapped[Any]:
        """A str, or a uuid.UUID where the column is UUID."""
        column_type = task_id_type(cls.__table_config__.field_for_task_id)
        return mapped_column(column_type, sort_order=_FIRST)

    @classmethod
    def name_of(cls, config: TableConfig) -> str:
        """What this table is called in a configuration."""
        raise NotImplementedError

    @classmethod
    def _table_args(cls, *indexes: Index, **options: Any) -> tuple[Any, ...]:
        config = cls.__table_config__
        schema = None if config.schema is None else quoted(config.schema)
        key = PrimaryKeyConstraint("task_id", name=final(primary_key_name(cls.name_of(config))))
        return key, *indexes, {"schema": schema, **options}

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return quoted(cls.name_of(cls.__table_config__))

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        return cls._table_args(postgresql_using=HALF_FULL)


class ResultMixin(TableMixin):
    """The columns and indexes of a results table.

    Subclass it beside your own Base to add columns; `__table_config__` says which types and
    names the table has, and nothing else has to be set:

        class Result(ResultMixin, Base):
            __table_config__ = TableConfig(table_name="results")
            tenant: Mapped[str | None]
    """

    @classmethod
    def name_of(cls, config: TableConfig) -> str:
        """The results table."""
        return config.table_name

    @declared_attr.directive
    def __table_args__(cls) -> tuple[Any, ...]:
        config = cls.__table_config__
        is_set = column("expires_at").is_not(None)
        return cls._table_args(
            Index(final(config.finished_at_index_name), "finished_at", postgresql_using="brin"),
            Index(final(config.expires_at_index_name), "expires_at", postgresql_where=is_set),
        )

    is_err: Mapped[bool] = mapped_column(Boolean, sort_order=_FIRST + 1)

    @declared_attr
    def return_value(cls) -> Mapped[Any]:
        """The serialized return value: bytes, or JSON where the column is JSONB."""
        return _payload(cls, 2, nullable=False)

    @declared_attr
    def error(cls) -> Mapped[Any]:
        """The serialized exception, or None."""
        return _payload(cls, 3, nullable=True)

    error_type: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 4)
    traceback: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 5)
    execution_time: Mapped[float] = mapped_column(Double, sort_order=_FIRST + 6)
    labels: Mapped[dict[str, Any]] = mapped_column(JSONB, sort_order=_FIRST + 7)
    log: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 8)
    task_name: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 9)
    attempt: Mapped[int] = mapped_column(
        Integer, default=0, server_default=text("0"), sort_order=_FIRST + 10
    )
    finished_at: Mapped[datetime] = _stamp(11)
    expires_at: Mapped[datetime | None] = _time(12)
    args: Mapped[list[Any] | None] = _json(13)
    kwargs: Mapped[dict[str, Any] | None] = _json(14)
    worker: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 15)
    queued_at: Mapped[datetime | None] = _time(16)
    started_at: Mapped[datetime | None] = _time(17)

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


class ProgressMixin(TableMixin):
    """The columns of a progress table; subclass it as you subclass ResultMixin."""

    @classmethod
    def name_of(cls, config: TableConfig) -> str:
        """The progress table."""
        return config.progress_table_name

    state: Mapped[str] = mapped_column(Text, sort_order=_FIRST + 1)

    @declared_attr
    def meta(cls) -> Mapped[Any]:
        """The serialized metadata of the progress, or None."""
        return _payload(cls, 2, nullable=True)

    updated_at: Mapped[datetime] = _stamp(3)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, state={self.state!r})"


class StatusMixin(TableMixin):
    """The columns of a status table; subclass it as you subclass ResultMixin."""

    @classmethod
    def name_of(cls, config: TableConfig) -> str:
        """The status table."""
        return config.status_table_name

    state: Mapped[str] = mapped_column(Text, sort_order=_FIRST + 1)
    task_name: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 2)
    attempt: Mapped[int] = mapped_column(
        Integer, default=0, server_default=text("0"), sort_order=_FIRST + 3
    )
    queued_at: Mapped[datetime | None] = _time(4)
    started_at: Mapped[datetime | None] = _time(5)
    worker: Mapped[str | None] = mapped_column(Text, sort_order=_FIRST + 6)
    updated_at: Mapped[datetime] = _stamp(7)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task_id={self.task_id!r}, state={self.state!r})"
