"""Metadata of a task, carried from taskiq's message to the row of its result."""

from datetime import datetime
from typing import Final, NamedTuple

from pydantic import BaseModel


class TaskMetadata(NamedTuple):
    """Columns of a result's row; args and kwargs are JSON text."""

    task_name: str | None = None
    args: str | None = None
    kwargs: str | None = None
    worker: str | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None


NO_TASK_METADATA: Final = TaskMetadata()

_ATTRIBUTE: Final = "_taskiq_sa_pg_metadata"


def attach(bearer: BaseModel, metadata: TaskMetadata) -> None:
    """Attaches metadata to a message or a result.

    Copies keep it; serialization and comparison ignore it.
    """
    # Like functools.cached_property, which pydantic supports.
    vars(bearer)[_ATTRIBUTE] = metadata


def task_metadata_of(bearer: BaseModel) -> TaskMetadata:
    """The attached metadata; NO_TASK_METADATA if there is none."""
    metadata: TaskMetadata = vars(bearer).get(_ATTRIBUTE, NO_TASK_METADATA)
    return metadata
