"""The tables as declarative classes: names, types, columns, and build_models()."""

from taskiq_sa_pg.models.build import Models as Models
from taskiq_sa_pg.models.build import build_models as build_models
from taskiq_sa_pg.models.build import choose_models as choose_models
from taskiq_sa_pg.models.config import DEFAULT_TABLE_NAME as DEFAULT_TABLE_NAME
from taskiq_sa_pg.models.config import PayloadField as PayloadField
from taskiq_sa_pg.models.config import TableConfig as TableConfig
from taskiq_sa_pg.models.config import TaskIdField as TaskIdField
from taskiq_sa_pg.models.config import flaw_of_key as flaw_of_key
from taskiq_sa_pg.models.config import primary_key_name as primary_key_name
from taskiq_sa_pg.models.config import shortened as shortened
from taskiq_sa_pg.models.mixins import DEFAULT_QUEUE as DEFAULT_QUEUE
from taskiq_sa_pg.models.mixins import ProgressMixin as ProgressMixin
from taskiq_sa_pg.models.mixins import QueueMixin as QueueMixin
from taskiq_sa_pg.models.mixins import ResultMixin as ResultMixin
from taskiq_sa_pg.models.mixins import ScheduleMixin as ScheduleMixin
from taskiq_sa_pg.models.mixins import StatusMixin as StatusMixin
from taskiq_sa_pg.models.mixins import WorkerMixin as WorkerMixin
from taskiq_sa_pg.models.mixins import as_interval as as_interval
from taskiq_sa_pg.models.mixins import final as final
from taskiq_sa_pg.models.mixins import quoted as quoted
