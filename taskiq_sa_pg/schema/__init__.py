"""The tables' schema: its versions for a history of your own, and the check of a database."""

from taskiq_sa_pg.schema.catalogue import describe_columns, select_sizes
from taskiq_sa_pg.schema.check import check, located
from taskiq_sa_pg.schema.revisions import IncludeName, downgrade, include_name, upgrade
from taskiq_sa_pg.schema.steps import LATEST_VERSION

__all__ = [
    "LATEST_VERSION",
    "IncludeName",
    "check",
    "describe_columns",
    "downgrade",
    "include_name",
    "located",
    "select_sizes",
    "upgrade",
]
