"""The schema's steps: DDL by Alembic's operations, one version at a time.

They are history: they name every column themselves and never look at the models, which may move
on. A step that has been released is never edited; a change is a new step.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql.elements import conv, quoted_name
from sqlalchemy.types import TypeEngine

from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.exceptions import ConfigurationError

LATEST_VERSION: Final = 3


def upgrade_step(op: Any, version: int, config: TableConfig) -> None:
    """Takes the tables from version - 1 to version.

    Raises:
        ConfigurationError: There is no such version.
    """
    _step(version)[0](op, config)


def downgrade_step(op: Any, version: int, config: TableConfig) -> None:
    """Takes the tables from version back to version - 1.

    Raises:
        ConfigurationError: There is no such version.
    """
    _step(version)[1](op, config)


def _create_tables(op: Any, config: TableConfig) -> None:
    payload_types: dict[str, TypeEngine[Any]] = {
        "Bytea": sa.LargeBinary(),
        "Jsonb": postgresql.JSONB(),
    }
    id_type = _id_type(config)
    payload_type = payload_types[config.field_for_payload]
    schema = _quoted_schema(config)
    timestamp = sa.DateTime(timezone=True)
    op.create_table(
        _quoted(config.table_name),
        sa.Column("task_id", id_type, nullable=False),
        sa.Column("is_err", sa.Boolean(), nullable=False),
        sa.Column("return_value", payload_type, nullable=False),
        sa.Column("error", payload_type, nullable=True),
        sa.Column("error_type", sa.Text(), nullable=True),
        sa.Column("traceback", sa.Text(), nullable=True),
        sa.Column("execution_time", sa.Double(), nullable=False),
        sa.Column("labels", postgresql.JSONB(), nullable=False),
        sa.Column("log", sa.Text(), nullable=True),
        sa.Column("task_name", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("finished_at", timestamp, server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", timestamp, nullable=True),
        sa.PrimaryKeyConstraint("task_id", name=_final(config.primary_key_name)),
        schema=schema,
    )
    op.create_index(
        _final(config.finished_at_index_name),
        _quoted(config.table_name),
        ["finished_at"],
        schema=schema,
        postgresql_using="brin",
    )
    op.create_index(
        _final(config.expires_at_index_name),
        _quoted(config.table_name),
        ["expires_at"],
        schema=schema,
        postgresql_where=sa.column("expires_at").is_not(None),
    )
    op.create_table(
        _quoted(config.progress_table_name),
        sa.Column("task_id", id_type, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("meta", payload_type, nullable=True),
        sa.Column("updated_at", timestamp, server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", name=_final(config.progress_primary_key_name)),
        schema=schema,
        # `postgresql_with` would say it better, and came with SQLAlchemy 2.1.
        postgresql_using="heap WITH (fillfactor = 50)",
    )


def _id_type(config: TableConfig) -> TypeEngine[Any]:
    types: dict[str, TypeEngine[Any]] = {
        "VarChar": sa.String(),
        "Text": sa.Text(),
        "Uuid": sa.Uuid(),
    }
    return types[config.field_for_task_id]


def _drop_tables(op: Any, config: TableConfig) -> None:
    schema = _quoted_schema(config)
    op.drop_table(_quoted(config.progress_table_name), schema=schema)
    op.drop_table(_quoted(config.table_name), schema=schema)


def _add_metadata(op: Any, config: TableConfig) -> None:
    timestamp = sa.DateTime(timezone=True)
    # One ALTER TABLE each: of NULLs alone, so no row is touched.
    for column in (
        sa.Column("args", postgresql.JSONB(), nullable=True),
        sa.Column("kwargs", postgresql.JSONB(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("queued_at", timestamp, nullable=True),
        sa.Column("started_at", timestamp, nullable=True),
    ):
        op.add_column(_quoted(config.table_name), column, schema=_quoted_schema(config))


def _drop_metadata(op: Any, config: TableConfig) -> None:
    for name in ("started_at", "queued_at", "worker", "kwargs", "args"):
        op.drop_column(_quoted(config.table_name), name, schema=_quoted_schema(config))


def _create_status(op: Any, config: TableConfig) -> None:
    timestamp = sa.DateTime(timezone=True)
    op.create_table(
        _quoted(config.status_table_name),
        sa.Column("task_id", _id_type(config), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("task_name", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_at", timestamp, nullable=True),
        sa.Column("started_at", timestamp, nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("updated_at", timestamp, server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", name=_final(config.status_primary_key_name)),
        schema=_quoted_schema(config),
        postgresql_using="heap WITH (fillfactor = 50)",
    )


def _drop_status(op: Any, config: TableConfig) -> None:
    op.drop_table(_quoted(config.status_table_name), schema=_quoted_schema(config))


_Step = Callable[[Any, TableConfig], None]
_STEPS: Final[Mapping[int, tuple[_Step, _Step]]] = {
    1: (_create_tables, _drop_tables),
    2: (_add_metadata, _drop_metadata),
    3: (_create_status, _drop_status),
}


def _step(version: int) -> tuple[_Step, _Step]:
    if version not in _STEPS:
        raise ConfigurationError(
            f"there is no version {version!r} of the schema; the versions are 1 to {LATEST_VERSION}"
        )
    return _STEPS[version]


def _quoted(name: str) -> quoted_name:
    return quoted_name(name, quote=True)


def _final(name: str) -> conv:
    # Beyond the reach of the metadata's naming_convention, which may rewrite given names too.
    return conv(_quoted(name))


def _quoted_schema(config: TableConfig) -> quoted_name | None:
    return None if config.schema is None else _quoted(config.schema)
