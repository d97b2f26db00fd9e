"""Errors told apart: what passes, what stays, and what a pooler's errors say to do."""

import ssl

import asyncpg
import psycopg
import pytest

from taskiq_sa_pg.database.errors import describe, invalidates_all, is_disconnect, is_transient

LASTING = [
    asyncpg.UniqueViolationError("x"),
    asyncpg.UndefinedTableError("x"),
    asyncpg.InvalidPasswordError("x"),
    asyncpg.InsufficientPrivilegeError("x"),
    asyncpg.DiskFullError("x"),
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
