"""What is tried again, for how long, and what the log says of it."""

import asyncio
import logging
import ssl
from typing import Any

import asyncpg
import pytest

from taskiq_sa_pg.faults import is_lost_connection, is_transient
from taskiq_sa_pg.retries import Retries

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
LOST = [
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
PASSING = [
    asyncpg.TooManyConnectionsError("x"),
    asyncpg.SerializationError("x"),
    asyncpg.DeadlockDetectedError("x"),
    asyncpg.LockNotAvailableError("x"),
    asyncpg.ReadOnlySQLTransactionError("x"),
]


@pytest.mark.parametrize("error", [*LASTING, *LOST, *PASSING], ids=repr)
def test_faults_are_told_apart(error: Exception) -> None:
    assert is_transient(error) == (error in LOST or error in PASSING)
    assert is_lost_connection(error) == (error in LOST)


class Attempts:
    """Fails with these errors one after the other, and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.count = 0

    async def __call__(self) -> str:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_what_passes_is_tried_again_until_it_has_passed() -> None:
    attempts = Attempts(*LOST, *PASSING)
    assert await Retries(60).run(attempts) == "done"
    assert attempts.count == len(LOST) + len(PASSING) + 1


@pytest.mark.parametrize("error", LASTING, ids=repr)
@pytest.mark.parametrize("before", [0, 2])
async def test_what_does_not_pass_is_raised_at_once(error: Exception, before: int) -> None:
    attempts = Attempts(*[ConnectionResetError()] * before, error)
    with pytest.raises(type(error)):
        await Retries(60).run(attempts)
    assert attempts.count == before + 1


async def test_it_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(*[ConnectionResetError(str(i)) for i in range(100_000)])
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionResetError) as caught:
            await Retries(0.3).run(attempts)
    assert attempts.count > 1
    assert caught.value.args == (str(attempts.count - 1),)


async def test_without_time_there_is_one_attempt() -> None:
    for retries, timeout in ((Retries(0), None), (Retries(60), 0.0)):
        attempts = Attempts(ConnectionResetError())
        with pytest.raises(ConnectionResetError):
            await retries.run(attempts, timeout)
        assert attempts.count == 1


async def test_the_log_tells_when_trouble_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    retries = Retries(60)
    await asyncio.gather(
        *[retries.run(Attempts(*[ConnectionResetError("by peer")] * 5)) for _ in "abc"]
    )
    assert await retries.run(Attempts()) == "done"
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO"]
    begun, ended = [record.getMessage() for record in caplog.records]
    assert begun == "PostgreSQL: by peer; trying again for up to 60 s"
    assert ended.startswith("PostgreSQL: recovered after ")


async def test_conflicts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    errors: list[Any] = [asyncpg.SerializationError("x"), asyncpg.DeadlockDetectedError("x")]
    await Retries(60).run(Attempts(*errors))
    assert caplog.records == []
