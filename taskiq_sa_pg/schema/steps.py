"""The schema's steps: DDL with Alembic's operations, one step for each version.

The results' tables and the broker's have separate steps. A step names every column and never uses
the models, which may change later. A released step is never edited; a change is a new step.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from taskiq_sa_pg.models import TableConfig, final, primary_key_name, quoted

LATEST_VERSION: Final = 1

_Types = Mapping[str, type[sa.types.TypeEngine[Any]]]
_ID_TYPES: Final[_Types] = {"VarChar": sa.String, "Text": sa.Text, "Uuid": sa.Uuid}
_PAYLOAD_TYPES: Final[_Types] = {"Bytea": sa.LargeBinary, "Jsonb": postgresql.JSONB}

# `postgresql_with` needs SQLAlchemy 2.1.
_HALF_FULL: Final = "heap WITH (fillfactor = 50)"
_QUICKLY_VACUUMED: Final = (
    "heap WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, "
    "autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 1000, "
    "autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 1000)"
)
_TIMESTAMP: Final = sa.DateTime(timezone=True)


class Step(NamedTuple):
    """Upgrades the tables from the version before, and downgrades them again; with Alembic's `op`.

    The upgrade receives the names of the tables to change: all, or those to create again.
    """

    upgrade: Callable[[Any, TableConfig, Collection[str]], None]
    downgrade: Callable[[Any, TableConfig], None]


def _create_tables(op: Any, config: TableConfig, names: Collection[str]) -> None:
    makers = (_create_results, _create_progress, _create_statuses, _create_workers)
    for name, create in zip(config.table_names, makers, strict=True):
        if name in names:
            create(op, config)


def _create_results(op: Any, config: TableConfig) -> None:
    payload_type = _PAYLOAD_TYPES[config.field_for_payload]
    _create_table(
        op,
        config,
        config.table_name,
        _task_id(config),
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
        sa.Column("finished_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", _TIMESTAMP, nullable=True),
        sa.Column("args", postgresql.JSONB(), nullable=True),
        sa.Column("kwargs", postgresql.JSONB(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("queued_at", _TIMESTAMP, nullable=True),
        sa.Column("started_at", _TIMESTAMP, nullable=True),
    )
    place, is_set = config.table_name, sa.column("expires_at").is_not(None)
    finished_at, expires_at = config.finished_at_index_name, config.expires_at_index_name
    brin = {"postgresql_using": "brin", "postgresql_with": {"autosummarize": "on"}}
    _create_index(op, config, place, finished_at, ["finished_at"], **brin)
    _create_index(op, config, place, expires_at, ["expires_at"], postgresql_where=is_set)


def _create_progress(op: Any, config: TableConfig) -> None:
    payload_type = _PAYLOAD_TYPES[config.field_for_payload]
    _create_table(
        op,
        config,
        config.progress_table_name,
        _task_id(config),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("meta", payload_type(), nullable=True),
        sa.Column("updated_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        postgresql_using=_HALF_FULL,
    )


def _create_statuses(op: Any, config: TableConfig) -> None:
    _create_table(
        op,
        config,
        config.status_table_name,
        _task_id(config),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("task_name", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_at", _TIMESTAMP, nullable=True),
        sa.Column("started_at", _TIMESTAMP, nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("updated_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        postgresql_using=_HALF_FULL,
    )


def _create_workers(op: Any, config: TableConfig) -> None:
    _create_table(
        op,
        config,
        config.workers_table_name,
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("started_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        sa.Column("seen_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        postgresql_using=_HALF_FULL,
    )


def _drop_tables(op: Any, config: TableConfig) -> None:
    _drop(op, config, config.table_names)


def _create_queue_tables(op: Any, config: TableConfig, names: Collection[str]) -> None:
    makers = (_create_queue, _create_schedules)
    for name, create in zip(config.queue_table_names, makers, strict=True):
        if name in names:
            create(op, config)


def _create_queue(op: Any, config: TableConfig) -> None:
    _create_table(
        op,
        config,
        config.queue_table_name,
        _task_id(config),
        sa.Column("queue_name", sa.Text(), server_default=sa.text("'default'"), nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("available_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        sa.Column("claim", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("deliveries", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("task_name", sa.Text(), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.Column("queued_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        postgresql_using=_QUICKLY_VACUUMED,
    )
    columns = ["queue_name", sa.column("priority").desc(), "available_at"]
    index_name = config.available_at_index_name
    _create_index(op, config, config.queue_table_name, index_name, columns)


def _create_schedules(op: Any, config: TableConfig) -> None:
    _create_table(
        op,
        config,
        config.schedules_table_name,
        sa.Column("schedule_id", sa.Text(), nullable=False),
        sa.Column("task_name", sa.Text(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=True),
        sa.Column("interval", sa.Interval(), nullable=True),
        sa.Column("time", _TIMESTAMP, nullable=True),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.Column("last_tick", _TIMESTAMP, nullable=True),
        sa.Column("created_at", _TIMESTAMP, server_default=sa.func.now(), nullable=False),
        sa.Column("is_labelled", sa.Boolean(), server_default=sa.false(), nullable=False),
        postgresql_using=_HALF_FULL,
    )


def _drop_queue_tables(op: Any, config: TableConfig) -> None:
    _drop(op, config, config.queue_table_names)


def _task_id(config: TableConfig) -> sa.Column[Any]:
    return sa.Column("task_id", _ID_TYPES[config.field_for_task_id](), nullable=False)


def _create_table(
    op: Any,
    config: TableConfig,
    name: str,
    key: sa.Column[Any],
    *columns: sa.Column[Any],
    **options: Any,
) -> None:
    op.create_table(
        quoted(name),
        key,
        *columns,
        sa.PrimaryKeyConstraint(key.name, name=final(primary_key_name(name))),
        schema=_schema(config),
        **options,
    )


def _create_index(
    op: Any, config: TableConfig, table_name: str, name: str, columns: list[Any], **options: Any
) -> None:
    op.create_index(final(name), quoted(table_name), columns, schema=_schema(config), **options)


def _drop(op: Any, config: TableConfig, names: tuple[str, ...]) -> None:
    for name in reversed(names):
        op.drop_table(quoted(name), schema=_schema(config))


def _schema(config: TableConfig) -> str | None:
    return None if config.schema is None else quoted(config.schema)


RESULT_STEPS: Final[Mapping[int, Step]] = {1: Step(_create_tables, _drop_tables)}
QUEUE_STEPS: Final[Mapping[int, Step]] = {1: Step(_create_queue_tables, _drop_queue_tables)}
