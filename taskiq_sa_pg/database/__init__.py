"""Database access: DSNs, engines, connections, statements with retries, and errors."""

from taskiq_sa_pg.database.connections import check_loop as check_loop
from taskiq_sa_pg.database.database import DEFAULT_COMMAND_TIMEOUT as DEFAULT_COMMAND_TIMEOUT
from taskiq_sa_pg.database.database import DEFAULT_MAX_CONNECTIONS as DEFAULT_MAX_CONNECTIONS
from taskiq_sa_pg.database.database import DEFAULT_RETRY_TIMEOUT as DEFAULT_RETRY_TIMEOUT
from taskiq_sa_pg.database.database import Database as Database
from taskiq_sa_pg.database.direct import Parameters as Parameters
from taskiq_sa_pg.database.direct import time_limit as time_limit
from taskiq_sa_pg.database.dsn import DsnSource as DsnSource
from taskiq_sa_pg.database.dsn import parse_dsn as parse_dsn
from taskiq_sa_pg.database.engine import make_engine as make_engine
from taskiq_sa_pg.database.errors import CONVERSION_ERRORS as CONVERSION_ERRORS
from taskiq_sa_pg.database.errors import READ_ONLY as READ_ONLY
from taskiq_sa_pg.database.errors import describe as describe
from taskiq_sa_pg.database.errors import is_transient as is_transient
from taskiq_sa_pg.database.errors import is_unfit_value as is_unfit_value
from taskiq_sa_pg.database.errors import reason_of as reason_of
from taskiq_sa_pg.database.errors import sqlstate_of as sqlstate_of
from taskiq_sa_pg.database.place import repr_at as repr_at
