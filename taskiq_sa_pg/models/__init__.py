"""The tables as declarative classes: their names and types, their columns, and build_models()."""

from taskiq_sa_pg.models.build import Models, build_models
from taskiq_sa_pg.models.config import (
    DEFAULT_TABLE_NAME,
    PayloadField,
    TableConfig,
    TaskIdField,
    primary_key_name,
)
from taskiq_sa_pg.models.mixins import (
    ProgressMixin,
    ResultMixin,
    StatusMixin,
    as_interval,
    final,
    quoted,
)

__all__ = [
    "DEFAULT_TABLE_NAME",
    "Models",
    "PayloadField",
    "ProgressMixin",
    "ResultMixin",
    "StatusMixin",
    "TableConfig",
    "TaskIdField",
    "as_interval",
    "build_models",
    "final",
    "primary_key_name",
    "quoted",
]
