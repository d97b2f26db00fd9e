"""What is known of a task beside its result, on its way from taskiq's message to the row."""

from datetime import datetime
from typing import Final, NamedTuple

from pydantic import BaseModel


class TaskMetadata(NamedTuple):
    """Columns of a result's row; args and kwargs as JSON text."""

    task_name: str | None = None
    args: str | None = None
    kwargs: str | None = None
    worker: str | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None


NO_TASK_METADATA: Final = TaskMetadata()

_ATTRIBUTE: Final = "_taskiq_sa_pg_metadata"


def attach(bearer: BaseModel, metadata: TaskMetadata) -> None:
    """Gives a message or a result its metadata, which goes where it goes and ends when it ends.

    The bearer's copies have it too; no serialization of it, and no comparison, takes notice.
    """
    # As functools.cached_property does, which pydantic provides for.
    vars(bearer)[_ATTRIBUTE] = metadata


def task_metadata_of(bearer: BaseModel) -> TaskMetadata:
    """What was attached; NO_TASK_METADATA where nothing was."""
    metadata: TaskMetadata = vars(bearer).get(_ATTRIBUTE, NO_TASK_METADATA)
    return metadata
