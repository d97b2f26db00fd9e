"""What can be done with results: stored, read, waited for, searched, tracked, pruned."""

from taskiq_sa_pg.results.extra_values import ExtraValues, ExtraValuesFunction
from taskiq_sa_pg.results.methods import ResultMethods
from taskiq_sa_pg.results.pruner import Pruned
from taskiq_sa_pg.results.runtime import Runtime, SchemaCheck, Settings
from taskiq_sa_pg.results.status import State, TaskStatus, Track

__all__ = [
    "ExtraValues",
    "ExtraValuesFunction",
    "Pruned",
    "ResultMethods",
    "Runtime",
    "SchemaCheck",
    "Settings",
    "State",
    "TaskStatus",
    "Track",
]
