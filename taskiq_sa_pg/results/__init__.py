"""What can be done with results: stored, read, waited for, searched, tracked, pruned."""

from taskiq_sa_pg.results.extra_values import ExtraValues as ExtraValues
from taskiq_sa_pg.results.extra_values import ExtraValuesFunction as ExtraValuesFunction
from taskiq_sa_pg.results.methods import ResultMethods as ResultMethods
from taskiq_sa_pg.results.pruner import Pruned as Pruned
from taskiq_sa_pg.results.runtime import Runtime as Runtime
from taskiq_sa_pg.results.settings import DEFAULT_GATHER_WINDOW as DEFAULT_GATHER_WINDOW
from taskiq_sa_pg.results.settings import Settings as Settings
from taskiq_sa_pg.results.settings import Track as Track
from taskiq_sa_pg.results.status import State as State
from taskiq_sa_pg.results.status import TaskStatus as TaskStatus
