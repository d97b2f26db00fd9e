"""What goes wrong with a database: told apart, and put into words."""

import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

# https://www.postgresql.org/docs/18/errcodes-appendix.html
READ_ONLY: Final = "25006"

# What a person can do about an SQLSTATE.
_REMEDIES: Final[Mapping[str, str]] = {
    "42P01": "make the tables with `alembic upgrade head` or `taskiq-sa-pg upgrade`; the broker's "
    "with `alembic -x queue=true upgrade head` or `taskiq-sa-pg upgrade --queue`",
    "42703": "`taskiq-sa-pg check` (of the broker's, with --queue) says which columns differ",
    "42804": "`taskiq-sa-pg check` (of the broker's, with --queue) says which columns differ",
    "42501": "grant the role SELECT, INSERT, UPDATE and DELETE on the table, "
    "and USAGE on its schema",
    "3D000": "create the database, or correct the dsn",
    "28P01": "correct user and password in the dsn",
    READ_ONLY: "the server is a read replica (a hot standby), or was made read-only. Writes need "
    "the primary: name all hosts in the dsn, with target_session_attrs=read-write. A process that "
    "only reads uses keep_results=True",
}

# A statement was prepared on one of a pooler's servers, and is missed on another, or its
# name is taken there: "bind message supplies 1 parameters, but prepared statement ...".
_UNPREPARED: Final = frozenset({"26000", "42P05"})
_ANOTHER_PREPARED: Final = "but prepared statement"
_POOLED: Final = (
    "the address leads through a transaction pooler, such as PgBouncer, that does not carry "
    "prepared statements from server to server: turn them off with "
)
_POOLER_REMEDIES: Final[Mapping[str, str]] = {
    "asyncpg": _POOLED + 'connect_args={"statement_cache_size": 0} or ?statement_cache_size=0',
    "psycopg": _POOLED + 'connect_args={"prepare_threshold": None} or ?prepare_threshold=none',
}

# PgBouncer's own errors, those that pass and those that stay, all have this SQLSTATE.
_PROTOCOL_VIOLATION: Final = "08P01"
_REFUSED_SETTING: Final = "unsupported startup parameter"
_REFUSED_SETTING_REMEDY: Final = (
    "PgBouncer does not pass this setting on: leave it out of the dsn and connect_args and set it "
    "by ALTER ROLE or ALTER DATABASE, or have PgBouncer drop it with ignore_startup_parameters"
)

# Connection failures, and a server that shuts down, has crashed or is starting.
_DISCONNECTS: Final = ("08", "57P0")

# Beside all that is short: connections, memory, space on the disk.
_SHORTAGES: Final = "53"

# Serialization failures, deadlocks, lock timeouts, and a primary that has become a standby;
# statement_timeout, idle_in_transaction_session_timeout and transaction_timeout of the server's
# own; and a disk that failed to answer.
_TRANSIENT: Final = frozenset(
    {"40001", "40P01", "55P03", READ_ONLY, "57014", "25P03", "25P04", "58030"}
)

# What psycopg goes on to hear for a statement that it has prepared, once a table was altered.
_FEATURE_NOT_SUPPORTED: Final = "0A000"
_STALE_PLAN: Final = "cached plan must not change result type"

# What Python raises where a value is not what it should be. psycopg lets them pass.
CONVERSION_ERRORS: Final = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

# None of the hosts is a primary; and a server that closed the connection in the moment in which a
# statement began: "cannot switch to state 12; another operation (2) is in progress".
_DISCONNECTS_OF_ASYNCPG: Final = frozenset(
    {"TargetServerAttributeNotMatched", "InternalClientError"}
)

# psycopg has no SQLSTATE for a connection that failed, only libpq's text, and this is what a
# server or PgBouncer says in English about what no repetition mends.
_PERMANENT_TEXTS: Final = (
    "authentication failed",
    "does not exist",
    "no pg_hba.conf entry",
    "permission denied",
    "no password supplied",
    "no such user",
    _ANOTHER_PREPARED,
    _REFUSED_SETTING,
)


class NoPlaceError(Exception):
    """All connections of the pool are in use by others. Its arg: how many, with a blank."""

    def __str__(self) -> str:
        return (
            f"all {self.args[0]}connections of your engine's pool are checked out, and none came "
            "back in time: end the session first, give the pool more places, or give the backend, "
            "or the broker, a dsn= of its own"
        )


class NoAddressError(Exception):
    """A callable that is to return the DSN has failed."""


def errors_of(engine: AsyncEngine) -> tuple[type[Exception], ...]:
    """What is raised where a statement or a connection of this engine fails."""
    errors: tuple[type[Exception], ...] = (
        StatementError,
        PoolTimeoutError,
        OSError,
        NoPlaceError,
        NoAddressError,
    )
    # The driver's own where SQLAlchemy is not asked to execute, and in 2.0 where it cannot connect.
    dbapi: Any = engine.dialect.dbapi
    asyncpg = getattr(dbapi, "asyncpg", None)
    if asyncpg is not None:
        return *errors, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
    return *errors, dbapi.Error


def is_transient(error: Exception) -> bool:
    """Whether the same may succeed a little later."""
    sqlstate = sqlstate_of(error) or ""
    return (
        sqlstate in _TRANSIENT
        or sqlstate.startswith(_SHORTAGES)
        or isinstance(error, NoAddressError)
        or is_stale_plan(error)
        or is_disconnect(error)
    )


def is_stale_plan(error: BaseException) -> bool:
    """Whether a statement was prepared before a table was altered: a new connection can run it."""
    is_about_it = _STALE_PLAN in str(_said(error))
    return is_about_it and sqlstate_of(error) == _FEATURE_NOT_SUPPORTED


def is_refused_login(error: Exception) -> bool:
    """Whether the server does not accept the password."""
    return sqlstate_of(error) == "28P01" or "password authentication failed" in str(_said(error))


def is_unknown_host(error: Exception) -> bool:
    """Whether no name server knows the host, and not only whether none was asked in time."""
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_NONAME
    text = str(_said(error))  # psycopg's, with that of the C library
    return "failed to resolve host" in text and f"[Errno {int(socket.EAI_NONAME)}]" in text


def is_disconnect(error: Exception) -> bool:
    """Whether there is no connection (any more), so that nobody can know what became of a COMMIT.

    A server that does not answer in time counts.
    """
    if isinstance(error, OSError):
        # asyncpg raises it bare. A certificate that is wrong stays so.
        return not isinstance(error, ssl.SSLCertVerificationError)
    sqlstate = sqlstate_of(error)
    if sqlstate is not None:
        return sqlstate.startswith(_DISCONNECTS) and not (
            sqlstate == _PROTOCOL_VIOLATION and _is_permanent(error)
        )
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    said = _said(error)
    name = type(said).__name__
    if name in _DISCONNECTS_OF_ASYNCPG:
        return True
    if name == "InterfaceError":  # asyncpg's
        return "closed" in str(said)
    is_psycopgs = name in {"OperationalError", "ConnectionTimeout"}
    return is_psycopgs and not _is_permanent(error)


def is_unfit_value(error: BaseException | None) -> bool:
    """Whether a value never got to PostgreSQL: its type or the driver could not convert it."""
    if isinstance(error, DBAPIError):
        error = _said(error)
    if isinstance(error, OSError) or getattr(error, "sqlstate", None) is not None:
        return False
    # asyncpg's DataError and ClientConfigurationError are ValueErrors; the others are psycopg's.
    name = type(error).__name__
    if name == "ClientConfigurationError":
        return False
    return name in {"DataError", "ProgrammingError", "NotSupportedError"} or isinstance(
        error, (StatementError, *CONVERSION_ERRORS)
    )


def invalidates_all(error: Exception) -> bool:
    """Whether the other connections that were opened until now are probably of no use either."""
    return is_disconnect(error) or is_stale_plan(error) or sqlstate_of(error) == READ_ONLY


def describe(error: Exception, purpose: str, place: str = "") -> tuple[str, str | None]:
    """For those who call the library: what went wrong with its remedy, and PostgreSQL's code.

    The place is the server's address, which is told where no connection could be used.
    """
    at = f" (at {place})" if place and is_disconnect(error) else ""
    if isinstance(error, TimeoutError):
        return f"cannot {purpose}: PostgreSQL did not answer in time{at}", None
    if isinstance(error, OSError):
        # asyncpg raises it bare where no server answers.
        return f"cannot {purpose}: no connection to PostgreSQL: {reason_of(error)}{at}", None
    sqlstate = sqlstate_of(error)
    remedy = remedy_of(error)
    said = reason_of(error) + (f" ({sqlstate})" if sqlstate else "")
    return f"cannot {purpose}: {said}{at}" + (f"; {remedy}" if remedy else ""), sqlstate


def remedy_of(error: Exception) -> str | None:
    """What a person can do about it, as far as that is known."""
    sqlstate, said = sqlstate_of(error), _said(error)
    if sqlstate in _UNPREPARED or _ANOTHER_PREPARED in str(said):
        return _POOLER_REMEDIES.get(type(said).__module__.partition(".")[0])
    if _REFUSED_SETTING in str(said):
        return _REFUSED_SETTING_REMEDY
    return _REMEDIES.get(sqlstate or "")


def _is_permanent(error: Exception) -> bool:
    return any(text in str(_said(error)) for text in _PERMANENT_TEXTS)


def sqlstate_of(error: BaseException) -> str | None:
    """PostgreSQL's error code; None where the error came from the driver."""
    sqlstate: str | None = getattr(getattr(error, "orig", error), "sqlstate", None)
    return sqlstate


def reason_of(error: Exception) -> str:
    """What PostgreSQL or the driver said, in one line and without statement or parameters."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    said = _said(error)
    if type(said).__name__ == "InternalClientError":
        return f"the connection was lost ({said})"
    return str(said).strip().partition("\n")[0] or type(error).__name__


def _said(error: BaseException) -> BaseException:
    said: BaseException = getattr(error, "orig", None) or error
    # SQLAlchemy's own exception for asyncpg puts the name of a class before the text.
    if isinstance(error, DBAPIError):
        said = said.__cause__ or said
    return said
