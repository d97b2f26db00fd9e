"""A SQLAlchemy result backend for taskiq on PostgreSQL."""

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    InvalidTaskIdError,
    NotStartedError,
    ResultDecodeError,
    ResultIsMissingError,
    ResultSerializationError,
    SchemaError,
    StorageError,
    TaskiqSaPgError,
)
from taskiq_sa_pg.models import Models, ProgressMixin, ResultMixin, build_models

__all__ = [
    "ConfigurationError",
    "InvalidTaskIdError",
    "Models",
    "NotStartedError",
    "ProgressMixin",
    "ResultDecodeError",
    "ResultIsMissingError",
    "ResultMixin",
    "ResultSerializationError",
    "SQLAlchemyResultBackend",
    "SchemaError",
    "StorageError",
    "TableConfig",
    "TaskiqSaPgError",
    "build_models",
]
