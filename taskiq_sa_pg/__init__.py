"""A SQLAlchemy result backend for taskiq on PostgreSQL."""

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.broker import (
    ParkedTask,
    QueueCount,
    ScheduleInfo,
    SQLAlchemyBroker,
    SQLAlchemyScheduleSource,
)
from taskiq_sa_pg.codec import SignedSerializer
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    InvalidTaskIdError,
    MissingColumnsError,
    NotResendableError,
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
    WorkerMixin,
    build_models,
)
from taskiq_sa_pg.results import Page, Pruned, TaskDetails, TaskRecord, TaskStatus, WorkerInfo
from taskiq_sa_pg.task_ids import make_task_id
from taskiq_sa_pg.telemetry import BatchStats, Stats

__all__ = [
    "BatchStats",
    "ConfigurationError",
    "InvalidTaskIdError",
    "MissingColumnsError",
    "Models",
    "NotResendableError",
    "NotStartedError",
    "Page",
    "ParkedTask",
    "PayloadTooLargeError",
    "ProgressMixin",
    "Pruned",
    "QueueCount",
    "QueueMixin",
    "ResultDecodeError",
    "ResultIsMissingError",
    "ResultMixin",
    "ResultSerializationError",
    "SQLAlchemyBroker",
    "SQLAlchemyResultBackend",
    "SQLAlchemyScheduleSource",
    "ScheduleInfo",
    "ScheduleMixin",
    "SchemaError",
    "SignedSerializer",
    "Stats",
    "StatusMixin",
    "StorageError",
    "TableConfig",
    "TaskAbandonedError",
    "TaskDetails",
    "TaskMetadataMiddleware",
    "TaskRecord",
    "TaskStatus",
    "TaskiqSaPgError",
    "WorkerInfo",
    "WorkerMixin",
    "build_models",
    "make_task_id",
]
