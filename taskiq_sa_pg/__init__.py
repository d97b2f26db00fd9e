"""A SQLAlchemy result backend for taskiq on PostgreSQL."""

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.broker import SQLAlchemyBroker, SQLAlchemyScheduleSource
from taskiq_sa_pg.codec import SignedSerializer
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    InvalidTaskIdError,
    MissingColumnsError,
    NotStartedError,
    PayloadTooLargeError,
    ResultDecodeError,
    ResultIsMissingError,
    ResultSerializationError,
    SchemaError,
    StorageError,
    TaskAbandonedError,
    TaskiqSaPgError,
)
from taskiq_sa_pg.middleware import TaskMetadataMiddleware
from taskiq_sa_pg.models import (
    Models,
    ProgressMixin,
    QueueMixin,
    ResultMixin,
    ScheduleMixin,
    StatusMixin,
    TableConfig,
    build_models,
)
from taskiq_sa_pg.results import Pruned, TaskStatus
from taskiq_sa_pg.telemetry import BatchStats, Stats

__all__ = [
    "BatchStats",
    "ConfigurationError",
    "InvalidTaskIdError",
    "MissingColumnsError",
    "Models",
    "NotStartedError",
    "PayloadTooLargeError",
    "ProgressMixin",
    "Pruned",
    "QueueMixin",
    "ResultDecodeError",
    "ResultIsMissingError",
    "ResultMixin",
    "ResultSerializationError",
    "SQLAlchemyBroker",
    "SQLAlchemyResultBackend",
    "SQLAlchemyScheduleSource",
    "ScheduleMixin",
    "SchemaError",
    "SignedSerializer",
    "Stats",
    "StatusMixin",
    "StorageError",
    "TableConfig",
    "TaskAbandonedError",
    "TaskMetadataMiddleware",
    "TaskStatus",
    "TaskiqSaPgError",
    "build_models",
]
