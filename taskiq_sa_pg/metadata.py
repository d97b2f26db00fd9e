"""What is known of a task beside its result, on its way from taskiq's message to the row."""

from typing import Final, NamedTuple

from pydantic import BaseModel


class Metadata(NamedTuple):
    """Columns of a result's row; args and kwargs as JSON text, times as seconds since 1970."""

    task_name: str | None = None
    args: str | None = None
    kwargs: str | None = None
    worker: str | None = None
    queued_at: float | None = None
    started_at: float | None = None


NO_METADATA: Final = Metadata()

_ATTRIBUTE: Final = "_taskiq_sa_pg_metadata"


def attach(bearer: BaseModel, metadata: Metadata) -> None:
    """Gives a message or a result its metadata, which goes where it goes and ends when it ends.

    The bearer's copies have it too; no serialization of it, and no comparison, takes notice.
    """
    # As functools.cached_property does, which pydantic provides for.
    vars(bearer)[_ATTRIBUTE] = metadata


def metadata_of(bearer: BaseModel) -> Metadata:
    """What was attached; NO_METADATA where nothing was."""
    metadata: Metadata = vars(bearer).get(_ATTRIBUTE, NO_METADATA)
    return metadata
