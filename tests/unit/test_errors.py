"""Errors told apart: what passes, what stays, and what a pooler's errors say to do."""

import ssl

import asyncpg
import psycopg
import pytest
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError

from taskiq_sa_pg.database.errors import describe, invalidates_all, is_disconnect, is_transient

LASTING = [
    asyncpg.UniqueViolationError("x"),
    asyncpg.UndefinedTableError("x"),
    asyncpg.InvalidPasswordError("x"),
    asyncpg.InsufficientPrivilegeError("x"),
    asyncpg.DataError("invalid input for query argument $1"),
    asyncpg.InterfaceError("cannot perform operation: another operation is in progress"),
    ssl.SSLCertVerificationError("x"),
    ValueError("x"),
]
DISCONNECTS = [
    asyncpg.ConnectionDoesNotExistError("x"),
    asyncpg.AdminShutdownError("x"),
    asyncpg.CrashShutdownError("x"),
    asyncpg.CannotConnectNowError("x"),
    asyncpg.InterfaceError("connection is closed"),
    asyncpg.exceptions.TargetServerAttributeNotMatched("x"),
    asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
    ConnectionRefusedError("x"),
    ConnectionResetError("x"),
    FileNotFoundError("x"),
    TimeoutError(),
]
READ_ONLY = asyncpg.ReadOnlySQLTransactionError("x")
PASSING = [
    asyncpg.TooManyConnectionsError("x"),
    asyncpg.SerializationError("x"),
    asyncpg.DeadlockDetectedError("x"),
    asyncpg.LockNotAvailableError("x"),
    READ_ONLY,
]


@pytest.mark.parametrize("error", [*LASTING, *DISCONNECTS, *PASSING], ids=repr)
def test_errors_are_told_apart(error: Exception) -> None:
    assert is_transient(error) == (error in DISCONNECTS or error in PASSING)
    assert is_disconnect(error) == (error in DISCONNECTS)
    assert invalidates_all(error) == (error in DISCONNECTS or error is READ_ONLY)


# What passes by itself, by PostgreSQL's code.
PASSING_CODES = {
    "40001": "serialization_failure",
    "40P01": "deadlock_detected",
    "53000": "insufficient_resources",
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "55P03": "lock_not_available",
    "57014": "query_canceled, by the server's statement_timeout",
    "57P01": "admin_shutdown",
    "57P02": "crash_shutdown",
    "57P03": "cannot_connect_now",
    "57P05": "idle_session_timeout",
    "25006": "read_only_sql_transaction",
    "25P03": "idle_in_transaction_session_timeout",
    "25P04": "transaction_timeout",
    "58030": "io_error",
    "08006": "connection_failure",
    "0A000": "cached plan must not change result type",
}
LASTING_CODES = {
    "0A000": "not implemented",
    "22001": "string_data_right_truncation",
    "23505": "unique_violation",
    "28P01": "invalid_password",
    "3D000": "invalid_catalog_name",
    "42501": "insufficient_privilege",
    "42P01": "undefined_table",
    "42703": "undefined_column",
    "54000": "program_limit_exceeded",
    "P0001": "raise_exception",
}


def said_by(driver: str, sqlstate: str, text: str) -> Exception:
    """The server's error, as the driver raises it."""
    if driver == "asyncpg":
        return asyncpg.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": sqlstate, "M": text})
    try:
        return psycopg.errors.lookup(sqlstate)(text)
    except KeyError:  # one that this psycopg does not know
        error = psycopg.OperationalError(text)
        error.sqlstate = sqlstate
        return error


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    ("sqlstate", "text", "is_passing"),
    [
        *[(code, text, True) for code, text in PASSING_CODES.items()],
        *[(code, text, False) for code, text in LASTING_CODES.items()],
    ],
)
def test_both_drivers_agree_on_what_passes(
    driver: str, sqlstate: str, text: str, is_passing: bool
) -> None:
    error = said_by(driver, sqlstate, text)
    assert is_transient(error) is is_passing
    wrapped = DBAPIError("SELECT 1", {}, wrap(error) if driver == "asyncpg" else error)
    assert is_transient(wrapped) is is_passing


def wrap(error: Exception) -> Exception:
    """As SQLAlchemy's dialect wraps what asyncpg raises."""
    wrapper = AsyncAdapt_asyncpg_dbapi.Error(f"{type(error)}: {error}", error)
    wrapper.pgcode = wrapper.sqlstate = error.sqlstate
    wrapper.__cause__ = error
    return wrapper


FOR_ASYNCPG = 'connect_args={"statement_cache_size": 0} or ?statement_cache_size=0'
FOR_PSYCOPG = 'connect_args={"prepare_threshold": None} or ?prepare_threshold=none'
FOR_SETTINGS = "ignore_startup_parameters"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            asyncpg.InvalidSQLStatementNameError('prepared statement "a" does not exist'),
            FOR_ASYNCPG,
        ),
        (asyncpg.DuplicatePreparedStatementError('prepared statement "a" exists'), FOR_ASYNCPG),
        (psycopg.errors.InvalidSqlStatementName('prepared statement "_pg3_0" ...'), FOR_PSYCOPG),
        (psycopg.errors.DuplicatePreparedStatement('prepared statement "_pg3_0"'), FOR_PSYCOPG),
        (
            psycopg.errors.ProtocolViolation(
                'bind message supplies 1 parameters, but prepared statement "_pg3_0" requires 2'
            ),
            FOR_PSYCOPG,
        ),
        (
            asyncpg.ProtocolViolationError("unsupported startup parameter: search_path"),
            FOR_SETTINGS,
        ),
        (
            psycopg.OperationalError(
                "connection failed: FATAL:  unsupported startup parameter in options: search_path"
            ),
            FOR_SETTINGS,
        ),
    ],
    ids=repr,
)
def test_a_wrong_setting_is_an_error_that_names_the_right_one(
    error: Exception, remedy: str
) -> None:
    text, _ = describe(error, "store its result")
    assert text.startswith(f"cannot store its result: {error}")
    assert remedy in text
    assert "\n" not in text
    assert not is_transient(error)


@pytest.mark.parametrize(
    "said", ["query_wait_timeout", "server conn crashed?", "no more connections allowed"]
)
def test_pgbouncers_errors_that_pass_are_tried_again(said: str) -> None:
    assert is_transient(asyncpg.ProtocolViolationError(said))


@pytest.mark.parametrize("said", ['database "d" does not exist', "no such user"])
def test_pgbouncers_errors_that_stay_are_not(said: str) -> None:
    assert not is_transient(asyncpg.ProtocolViolationError(said))
    assert not is_transient(psycopg.OperationalError(f"connection failed: FATAL:  {said}"))
