"""A SQLAlchemy result backend for taskiq on PostgreSQL."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

    __version__: str

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

# The modules that define these names. Each is imported when a name of it is first used (PEP 562):
# together they take a second to import, and the command's `--help` needs none of them.
_NAMES = {
    "backend": "SQLAlchemyResultBackend",
    "broker": "ParkedTask QueueCount SQLAlchemyBroker SQLAlchemyScheduleSource ScheduleInfo",
    "codec": "SignedSerializer",
    "exceptions": (
        "ConfigurationError InvalidTaskIdError MissingColumnsError NotResendableError "
        "NotStartedError PayloadTooLargeError ResultDecodeError ResultIsMissingError "
        "ResultSerializationError SchemaError StorageError TaskAbandonedError TaskiqSaPgError"
    ),
    "middleware": "TaskMetadataMiddleware",
    "models": (
        "Models ProgressMixin QueueMixin ResultMixin ScheduleMixin StatusMixin TableConfig "
        "WorkerMixin build_models"
    ),
    "results": "Page Pruned TaskDetails TaskRecord TaskStatus WorkerInfo",
    "schema": "",
    "task_ids": "make_task_id",
    "telemetry": "BatchStats Stats",
}

if not TYPE_CHECKING:  # or any name would pass the type checker
    _modules = {name: module for module, names in _NAMES.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name == "__version__":
            # Here, because it is slow to import, too.
            from importlib.metadata import version  # noqa: PLC0415

            return globals().setdefault(name, version("taskiq-sa-pg"))
        if name in _modules:
            # Not kept: while a test patches the module, it is a mock.
            return getattr(import_module(f"{__name__}.{_modules[name]}"), name)
        if name in _NAMES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "__version__"})
