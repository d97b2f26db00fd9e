"""Operations on results: store, read, wait, search, track and prune."""

from taskiq_sa_pg.results.extra_values import ExtraValues as ExtraValues
from taskiq_sa_pg.results.extra_values import ExtraValuesFunction as ExtraValuesFunction
from taskiq_sa_pg.results.finding import DEFAULT_LIMIT as DEFAULT_LIMIT
from taskiq_sa_pg.results.finding import MAX_LIMIT as MAX_LIMIT
from taskiq_sa_pg.results.finding import Outcome as Outcome
from taskiq_sa_pg.results.finding import Page as Page
from taskiq_sa_pg.results.finding import TaskDetails as TaskDetails
from taskiq_sa_pg.results.finding import TaskRecord as TaskRecord
from taskiq_sa_pg.results.finding import check_query as check_query
from taskiq_sa_pg.results.methods import ResultMethods as ResultMethods
from taskiq_sa_pg.results.pruner import Pruned as Pruned
from taskiq_sa_pg.results.resend import REDACTED_LABEL as REDACTED_LABEL
from taskiq_sa_pg.results.resend import RERUN_LABEL as RERUN_LABEL
from taskiq_sa_pg.results.runtime import Runtime as Runtime
from taskiq_sa_pg.results.search import Where as Where
from taskiq_sa_pg.results.settings import DEFAULT_GATHER_WINDOW as DEFAULT_GATHER_WINDOW
from taskiq_sa_pg.results.settings import Settings as Settings
from taskiq_sa_pg.results.settings import Track as Track
from taskiq_sa_pg.results.status import State as State
from taskiq_sa_pg.results.status import TaskStatus as TaskStatus
from taskiq_sa_pg.results.wait import restore as restore
from taskiq_sa_pg.results.workers import WorkerInfo as WorkerInfo
from taskiq_sa_pg.results.workers import WorkerProcess as WorkerProcess
