"""Between taskiq's objects and the rows of the tables."""

from taskiq_sa_pg.codec.codec import Codec, attempt_of, reason_of
from taskiq_sa_pg.codec.decoding import RowDecoder
from taskiq_sa_pg.codec.exceptions import qualified_name
from taskiq_sa_pg.codec.jsonb import is_plain, storable_text, wrap
from taskiq_sa_pg.codec.retention import Retention, Seconds, check_seconds
from taskiq_sa_pg.codec.signing import SignedSerializer
from taskiq_sa_pg.codec.task_metadata import (
    NO_TASK_METADATA,
    TaskMetadata,
    attach,
    task_metadata_of,
)

__all__ = [
    "NO_TASK_METADATA",
    "Codec",
    "Retention",
    "RowDecoder",
    "Seconds",
    "SignedSerializer",
    "TaskMetadata",
    "attach",
    "attempt_of",
    "check_seconds",
    "is_plain",
    "qualified_name",
    "reason_of",
    "storable_text",
    "task_metadata_of",
    "wrap",
]
