"""Converts taskiq's objects to rows of the tables and back."""

from taskiq_sa_pg.codec.codec import UNREAD as UNREAD
from taskiq_sa_pg.codec.codec import Codec as Codec
from taskiq_sa_pg.codec.codec import attempt_of as attempt_of
from taskiq_sa_pg.codec.codec import read_labels as read_labels
from taskiq_sa_pg.codec.codec import reason_of as reason_of
from taskiq_sa_pg.codec.decoding import RowDecoder as RowDecoder
from taskiq_sa_pg.codec.exceptions import qualified_name as qualified_name
from taskiq_sa_pg.codec.jsonb import is_plain as is_plain
from taskiq_sa_pg.codec.jsonb import is_wrapper as is_wrapper
from taskiq_sa_pg.codec.jsonb import storable_text as storable_text
from taskiq_sa_pg.codec.jsonb import unwrap as unwrap
from taskiq_sa_pg.codec.jsonb import wrap as wrap
from taskiq_sa_pg.codec.retention import Retention as Retention
from taskiq_sa_pg.codec.retention import Seconds as Seconds
from taskiq_sa_pg.codec.retention import check_seconds as check_seconds
from taskiq_sa_pg.codec.signing import SignedSerializer as SignedSerializer
from taskiq_sa_pg.codec.task_metadata import NO_TASK_METADATA as NO_TASK_METADATA
from taskiq_sa_pg.codec.task_metadata import TaskMetadata as TaskMetadata
from taskiq_sa_pg.codec.task_metadata import attach as attach
from taskiq_sa_pg.codec.task_metadata import task_metadata_of as task_metadata_of
