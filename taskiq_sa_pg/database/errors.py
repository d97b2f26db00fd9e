"""Classifies database errors and describes them with a remedy."""

import re
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

# https://www.postgresql.org/docs/18/errcodes-appendix.html
READ_ONLY: Final = "25006"

# The remedy for an SQLSTATE.
_REMEDIES: Final[Mapping[str, str]] = {
    "42P01": "create the tables of this name and schema with `alembic upgrade head` or "
    "`taskiq-sa-pg upgrade`; the broker's with `alembic -x queue=true upgrade head` or "
    "`taskiq-sa-pg upgrade --queue`",
    "42703": "`taskiq-sa-pg check` (--queue for the broker's) reports which columns differ",
    "42804": "`taskiq-sa-pg check` (--queue for the broker's) reports which columns differ",
    "42501": "grant the role SELECT, INSERT, UPDATE and DELETE on the table, "
    "and USAGE on its schema",
    "3D000": "create the database, or correct its name in the dsn",
    "28P01": "correct the user and password in the dsn",
    READ_ONLY: "the server is a read replica (a hot standby), or was made read-only. Writes need "
    "the primary: list all hosts in the dsn, with target_session_attrs=read-write. In a process "
    "that only reads, set keep_results=True",
}

# A statement was prepared on one of a pooler's servers. On another it does not exist, or its
# name is taken: "bind message supplies 1 parameters, but prepared statement ...".
_UNPREPARED: Final = frozenset({"26000", "42P05"})
_ANOTHER_PREPARED: Final = "but prepared statement"
_POOLED: Final = (
    "the connection goes through a transaction pooler, such as PgBouncer, that does not support "
    "prepared statements: turn them off with "
)
_POOLER_REMEDIES: Final[Mapping[str, str]] = {
    "asyncpg": _POOLED + 'connect_args={"statement_cache_size": 0} or ?statement_cache_size=0',
    "psycopg": _POOLED + 'connect_args={"prepare_threshold": None} or ?prepare_threshold=none',
}

# All of PgBouncer's own errors have this SQLSTATE, the transient and the permanent ones.
_PROTOCOL_VIOLATION: Final = "08P01"
_REFUSED_SETTING: Final = "unsupported startup parameter"
_REFUSED_SETTING_REMEDY: Final = (
    "PgBouncer does not forward this setting: remove it from the dsn and connect_args and set it "
    "with ALTER ROLE or ALTER DATABASE, or list it in PgBouncer's ignore_startup_parameters"
)

# Connection failures, and a server that shuts down, has crashed or is starting.
_DISCONNECTS: Final = ("08", "57P0")

# Raised for a login: a wrong password, a missing pg_hba.conf entry, an unknown database, too many
# connections.
_REFUSED_LOGINS: Final = ("28", "3D000", "53300")

# Insufficient resources: connections, memory, disk space.
_SHORTAGES: Final = "53"

# Serialization failures, deadlocks, lock timeouts, and a primary that has become a standby; the
# server's statement_timeout, idle_in_transaction_session_timeout and transaction_timeout; and an
# I/O error.
_TRANSIENT: Final = frozenset(
    {"40001", "40P01", "55P03", READ_ONLY, "57014", "25P03", "25P04", "58030"}
)

# With psycopg, a prepared statement keeps failing with this after its table was altered.
_FEATURE_NOT_SUPPORTED: Final = "0A000"
_STALE_PLAN: Final = "cached plan must not change result type"

# Python's errors for a value of a wrong type or form. psycopg does not wrap them.
CONVERSION_ERRORS: Final = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

# None of the hosts is a primary; or the server closed the connection just when a statement began:
# "cannot switch to state 12; another operation (2) is in progress".
_DISCONNECTS_OF_ASYNCPG: Final = frozenset(
    {"TargetServerAttributeNotMatched", "InternalClientError"}
)

# psycopg has no SQLSTATE for a failed connection, only libpq's text. These are the English texts
# of permanent errors of a server or of PgBouncer.
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

# Those of them that have a remedy, with the SQLSTATE that PostgreSQL sends.
_SQLSTATES_OF_TEXTS: Final = (
    (re.compile("password authentication failed"), "28P01"),
    (re.compile('database ".*" does not exist'), "3D000"),
)


class NoPlaceError(Exception):
    """Other code uses all connections of the pool. args[0]: their number and a space, or ""."""

    def __str__(self) -> str:
        return (
            f"all {self.args[0]}connections of your engine's pool are checked out, and none was "
            "returned in time: close the session first, enlarge the pool, or pass dsn= instead of "
            "engine= to the backend or broker"
        )


class NoAddressError(Exception):
    """The callable that returns the DSN has raised."""


def errors_of(engine: AsyncEngine) -> tuple[type[Exception], ...]:
    """The exceptions that a failed statement or connection of this engine raises."""
    errors: tuple[type[Exception], ...] = (
        StatementError,
        PoolTimeoutError,
        OSError,
        NoPlaceError,
        NoAddressError,
    )
    # The driver's own: from statements that bypass SQLAlchemy and, in 2.0, from connecting.
    dbapi: Any = engine.dialect.dbapi
    asyncpg = getattr(dbapi, "asyncpg", None)
    if asyncpg is not None:
        return *errors, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
    return *errors, dbapi.Error


def is_transient(error: Exception) -> bool:
    """Whether a later attempt may succeed."""
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
    has_text = _STALE_PLAN in str(_cause(error))
    return has_text and sqlstate_of(error) == _FEATURE_NOT_SUPPORTED


def is_wrong_password(error: Exception) -> bool:
    """Whether the server does not accept the password."""
    return _known_sqlstate(error) == "28P01"


def is_unknown_host(error: Exception) -> bool:
    """Whether the host name does not exist; False if the name server did not answer."""
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_NONAME
    text = str(_cause(error))  # psycopg's, with that of the C library
    return "failed to resolve host" in text and f"[Errno {int(socket.EAI_NONAME)}]" in text


def is_disconnect(error: Exception) -> bool:
    """Whether the connection failed or was lost, so that the outcome of a COMMIT is unknown.

    True if the server does not answer in time.
    """
    if isinstance(error, OSError):
        # asyncpg does not wrap it. A wrong certificate is a permanent error.
        return not isinstance(error, ssl.SSLCertVerificationError)
    sqlstate = sqlstate_of(error)
    if sqlstate is not None:
        return sqlstate.startswith(_DISCONNECTS) and not (
            sqlstate == _PROTOCOL_VIOLATION and _is_permanent(error)
        )
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    cause = _cause(error)
    name = type(cause).__name__
    if name in _DISCONNECTS_OF_ASYNCPG:
        return True
    if name == "InterfaceError":  # asyncpg's
        return "closed" in str(cause)
    return _is_psycopgs(cause) and not _is_permanent(error)


def is_about_connecting(error: Exception) -> bool:
    """Whether the error's text should name the server: no connection, or a refused login."""
    sqlstate = sqlstate_of(error)
    if sqlstate is not None:
        return sqlstate.startswith((*_DISCONNECTS, *_REFUSED_LOGINS))
    return isinstance(error, OSError) or is_disconnect(error) or _is_psycopgs(_cause(error))


def is_unfit_value(error: BaseException | None) -> bool:
    """Whether the column's type or the driver could not convert a value, so it was not sent."""
    if isinstance(error, DBAPIError):
        error = _cause(error)
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
    """Whether the other open connections are probably unusable as well."""
    return is_disconnect(error) or is_stale_plan(error) or sqlstate_of(error) == READ_ONLY


def describe(error: Exception, purpose: str, place: str = "") -> tuple[str, str | None]:
    """The text of a StorageError, with the remedy, and the SQLSTATE.

    Args:
        error: What SQLAlchemy or the driver raised.
        purpose: What could not be done: "store the result of ...".
        place: The server's host and port, for errors about connecting.
    """
    at = name_server(error, place)
    if isinstance(error, TimeoutError):
        return f"cannot {purpose}: PostgreSQL did not answer in time{at}", None
    if isinstance(error, OSError):
        # asyncpg does not wrap it.
        return f"cannot {purpose}: no connection to PostgreSQL: {reason_of(error)}{at}", None
    sqlstate = sqlstate_of(error)
    remedy = remedy_of(error)
    reason = reason_of(error) + (f" ({sqlstate})" if sqlstate else "")
    return f"cannot {purpose}: {reason}{at}" + (f"; {remedy}" if remedy else ""), sqlstate


def name_server(error: Exception, place: str) -> str:
    """The part of an error's text that names the server; empty if it is not about connecting."""
    return f" (at {place})" if place and is_about_connecting(error) else ""


def remedy_of(error: Exception) -> str | None:
    """What the user can do about it; None if that is not known."""
    sqlstate, cause = _known_sqlstate(error), _cause(error)
    if sqlstate in _UNPREPARED or _ANOTHER_PREPARED in str(cause):
        return _POOLER_REMEDIES.get(type(cause).__module__.partition(".")[0])
    if _REFUSED_SETTING in str(cause):
        return _REFUSED_SETTING_REMEDY
    return _REMEDIES.get(sqlstate or "")


def _is_permanent(error: Exception) -> bool:
    return any(text in str(_cause(error)) for text in _PERMANENT_TEXTS)


def _is_psycopgs(cause: BaseException) -> bool:
    # Without an SQLSTATE, its errors of these classes come from connecting or a lost connection.
    return type(cause).__name__ in {"OperationalError", "ConnectionTimeout"}


def sqlstate_of(error: BaseException) -> str | None:
    """PostgreSQL's error code; None if the driver raised the error by itself."""
    sqlstate: str | None = getattr(getattr(error, "orig", error), "sqlstate", None)
    return sqlstate


def _known_sqlstate(error: Exception) -> str | None:
    """The SQLSTATE, or the one that the text of psycopg or PgBouncer stands for."""
    text = str(_cause(error))
    by_text = (code for pattern, code in _SQLSTATES_OF_TEXTS if pattern.search(text))
    return next(by_text, None) or sqlstate_of(error)


def reason_of(error: Exception) -> str:
    """The first line of PostgreSQL's or the driver's text, without statement and parameters."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = _cause(error)
    if type(cause).__name__ == "InternalClientError":
        return f"the connection was lost ({cause})"
    return str(cause).strip().partition("\n")[0] or type(error).__name__


def _cause(error: BaseException) -> BaseException:
    cause: BaseException = getattr(error, "orig", None) or error
    # SQLAlchemy's own exception for asyncpg puts the name of a class before the text.
    if isinstance(error, DBAPIError):
        cause = cause.__cause__ or cause
    return cause
