"""A database: where it is, the connections to it, and what becomes of its statements."""

from taskiq_sa_pg.database.connections import time_limit
from taskiq_sa_pg.database.database import (
    DEFAULT_COMMAND_TIMEOUT,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_RETRY_TIMEOUT,
    Database,
)
from taskiq_sa_pg.database.dsn import DsnSource, parse_dsn
from taskiq_sa_pg.database.engine import make_engine
from taskiq_sa_pg.database.errors import (
    CONVERSION_ERRORS,
    describe,
    is_transient,
    is_unfit_value,
    reason_of,
)

__all__ = [
    "CONVERSION_ERRORS",
    "DEFAULT_COMMAND_TIMEOUT",
    "DEFAULT_MAX_CONNECTIONS",
    "DEFAULT_RETRY_TIMEOUT",
    "Database",
    "DsnSource",
    "describe",
    "is_transient",
    "is_unfit_value",
    "make_engine",
    "parse_dsn",
    "reason_of",
    "time_limit",
]
