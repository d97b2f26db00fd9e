"""The schema's steps: DDL by Alembic's operations, one version at a time.

They are history: they name every column themselves and never look at the models, which may move
on. A step that has been released is never edited; a change is a new step.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.models import TableConfig, final, primary_key_name, quoted

LATEST_VERSION: Final = 1

_Types = Mapping[str, type[sa.types.TypeEngine[Any]]]
_ID_TYPES: Final[_Types] = {"VarChar": sa.String, "Text": sa.Text, "Uuid": sa.Uuid}
_PAYLOAD_TYPES: Final[_Types] = {"Bytea": sa.LargeBinary, "Jsonb": postgresql.JSONB}

# `postgresql_with` would say it better, and came with SQLAlchemy 2.1.
_HALF_FULL: Final = "heap WITH (fillfactor = 50)"


class Step(NamedTuple):
    """Takes the tables from the version before to its own, and back; with Alembic's `op`.

    The upgrade is told the names of the tables to take: all, or those that are to be made again.
    """

    upgrade: Callable[[Any, TableConfig, Collection[str]], None]
    downgrade: Callable[[Any, TableConfig], None]


def step_of(version: int) -> Step:
    """The step of a version.

    Raises:
        ConfigurationError: There is no such version.
    """
    if version not in _STEPS:
        raise ConfigurationError(
            f"there is no version {version!r} of the schema; the latest is {LATEST_VERSION}"
        )
    return _STEPS[version]


def _create_tables(op: Any, config: TableConfig, names: Collection[str]) -> None:
    makers = (_create_results, _create_progress, _create_statuses)
    for name, create in zip(config.table_names, makers, strict=True):
        if name in names:
            create(op, config, sa.DateTime(timezone=True))


def _create_results(op: Any, config: TableConfig, timestamp: sa.DateTime) -> None:
    payload_type = _PAYLOAD_TYPES[config.field_for_payload]
    _create_table(
        op,
        config,
        config.table_name,
        sa.Column("is_err", sa.Boolean(), nullable=False),
        sa.Column("return_value", payload_type(), nullable=False),
        sa.Column("error", payload_type(), nullable=True),
        sa.Column("error_type", sa.Text(), nullable=True),
        sa.Column("traceback", sa.Text(), nullable=True),
        sa.Column("execution_time", sa.Double(), nullable=False),
        sa.Column("labels", postgresql.JSONB(), nullable=False),
        sa.Column("log", sa.Text(), nullable=True),
        sa.Column("task_name", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("finished_at", timestamp, server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", timestamp, nullable=True),
        sa.Column("args", postgresql.JSONB(), nullable=True),
        sa.Column("kwargs", postgresql.JSONB(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("queued_at", timestamp, nullable=True),
        sa.Column("started_at", timestamp, nullable=True),
    )
    _create_index(op, config, config.finished_at_index_name, "finished_at", postgresql_using="brin")
    is_set = sa.column("expires_at").is_not(None)
    _create_index(op, config, config.expires_at_index_name, "expires_at", postgresql_where=is_set)


def _create_progress(op: Any, config: TableConfig, timestamp: sa.DateTime) -> None:
    payload_type = _PAYLOAD_TYPES[config.field_for_payload]
    _create_table(
        op,
        config,
        config.progress_table_name,
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("meta", payload_type(), nullable=True),
        sa.Column("updated_at", timestamp, server_default=sa.func.now(), nullable=False),
        postgresql_using=_HALF_FULL,
    )


def _create_statuses(op: Any, config: TableConfig, timestamp: sa.DateTime) -> None:
    _create_table(
        op,
        config,
        config.status_table_name,
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("task_name", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_at", timestamp, nullable=True),
        sa.Column("started_at", timestamp, nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("updated_at", timestamp, server_default=sa.func.now(), nullable=False),
        postgresql_using=_HALF_FULL,
    )


def _create_table(
    op: Any, config: TableConfig, name: str, *columns: sa.Column[Any], **options: Any
) -> None:
    op.create_table(
        quoted(name),
        sa.Column("task_id", _ID_TYPES[config.field_for_task_id](), nullable=False),
        *columns,
        sa.PrimaryKeyConstraint("task_id", name=final(primary_key_name(name))),
        schema=_schema(config),
        **options,
    )


def _create_index(op: Any, config: TableConfig, name: str, column: str, **options: Any) -> None:
    op.create_index(
        final(name),
        quoted(config.table_name),
        [column],
        schema=_schema(config),
        **options,
    )


def _drop_tables(op: Any, config: TableConfig) -> None:
    for name in reversed(config.table_names):
        op.drop_table(quoted(name), schema=_schema(config))


def _schema(config: TableConfig) -> str | None:
    return None if config.schema is None else quoted(config.schema)


_STEPS: Final[Mapping[int, Step]] = {1: Step(_create_tables, _drop_tables)}
