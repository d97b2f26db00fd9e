"""What is tried again, for how long, and what the log says of it."""

import asyncio
import logging
import socket

import asyncpg
import psycopg
import pytest

from taskiq_sa_pg.database.retry import Retry
from tests.unit.test_errors import DISCONNECTS, LASTING, PASSING


class Attempts:
    """Fails with these errors one after the other, and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.limits: list[float] = []
        self.count = 0

    async def __call__(self, seconds: float) -> str:
        self.count += 1
        self.limits.append(seconds)
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_what_passes_is_tried_again_until_it_has_passed() -> None:
    repeated: list[None] = []
    raised: list[Exception] = []
    retry = Retry(60, on_retry=lambda: repeated.append(None), on_error=raised.append)
    all_attempts = [Attempts(error) for error in [*DISCONNECTS, *PASSING]]
    all_attempts.append(Attempts(DISCONNECTS[0], PASSING[0], DISCONNECTS[1]))
    answers = await asyncio.gather(*[retry.run(attempts) for attempts in all_attempts])
    assert answers == ["done"] * len(all_attempts)
    counts = [attempts.count for attempts in all_attempts]
    assert counts == [2] * (len(all_attempts) - 1) + [4]
    assert len(repeated) == len(raised) == sum(counts) - len(counts)
    assert set(map(type, raised)) == set(map(type, [*DISCONNECTS, *PASSING]))


@pytest.mark.parametrize("error", LASTING, ids=repr)
@pytest.mark.parametrize("before", [0, 2])
async def test_what_does_not_pass_is_raised_at_once(error: Exception, before: int) -> None:
    attempts = Attempts(*[ConnectionResetError()] * before, error)
    raised: list[Exception] = []
    with pytest.raises(type(error)):
        await Retry(60, on_error=raised.append).run(attempts)
    assert attempts.count == len(raised) == before + 1
    assert raised[-1] is error


async def test_it_is_given_up_in_time() -> None:
    attempts = Attempts(*[ConnectionResetError(str(i)) for i in range(1_000)])
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionResetError) as caught:
            await Retry(0.3).run(attempts)
    assert attempts.count > 1
    assert caught.value.args == (str(attempts.count - 1),)


async def test_an_attempt_that_is_cut_short_does_not_hide_why_it_was_made() -> None:
    attempts = Attempts(*PASSING[:2])

    async def attempt(seconds: float) -> str:
        await attempts(seconds)
        await asyncio.sleep(seconds)
        raise TimeoutError

    with pytest.raises(type(PASSING[1])) as caught:
        await Retry(0.5, 60).run(attempt)
    assert caught.value is PASSING[1]


async def test_a_slow_first_attempt_leaves_no_time_for_another() -> None:
    attempts = Attempts()

    async def attempt(seconds: float) -> str:
        await attempts(seconds)
        await asyncio.sleep(seconds)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await Retry(0.05, 0.1).run(attempt)
    assert attempts.limits == [0.1]


@pytest.mark.parametrize(("timeout", "first"), [(None, 30), (3, 3), (50, 30), (0, 30)])
async def test_a_limit_that_is_given_bounds_every_attempt(
    timeout: float | None, first: float
) -> None:
    attempts = Attempts(*[ConnectionResetError()] * 2)
    retry = Retry(20, 30)
    if timeout == 0:
        with pytest.raises(ConnectionResetError):
            await retry.run(attempts, timeout)
        assert attempts.limits == [first]
    else:
        assert await retry.run(attempts, timeout) == "done"
        assert attempts.limits[0] == first
        whole = 20 if timeout is None else timeout
        assert all(0 < later < whole for later in attempts.limits[1:] if whole < 30)


UNKNOWN_HOST = [
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    psycopg.OperationalError(
        f"failed to resolve host 'nope': [Errno {int(socket.EAI_NONAME)}] Name or service not known"
    ),
]


@pytest.mark.parametrize("error", UNKNOWN_HOST, ids=repr)
async def test_a_host_that_nobody_has_heard_of_is_given_up_soon_at_first(
    error: Exception,
) -> None:
    retry = Retry(60, unknown_host_timeout=0.1)
    async with asyncio.timeout(5):
        with pytest.raises(type(error)):
            await retry.run(Attempts(*[error] * 1_000))
    # A name server may be mistaken for a moment: the name was known before.
    retry = Retry(60, unknown_host_timeout=0)
    assert await retry.run(Attempts()) == "done"
    assert await retry.run(Attempts(error, error)) == "done"


async def test_a_name_server_that_does_not_answer_is_waited_for() -> None:
    error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    retry = Retry(60, unknown_host_timeout=0)
    assert await retry.run(Attempts(error, error)) == "done"


async def test_without_time_there_is_one_attempt() -> None:
    for retry, timeout in ((Retry(0), None), (Retry(60), 0.0)):
        attempts = Attempts(ConnectionResetError())
        with pytest.raises(ConnectionResetError):
            await retry.run(attempts, timeout)
        assert attempts.count == 1


async def test_the_log_tells_when_trouble_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    retry = Retry(60)
    await asyncio.gather(
        *[retry.run(Attempts(*[ConnectionResetError("by peer")] * 2)) for _ in "abc"]
    )
    assert await retry.run(Attempts()) == "done"
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO"]
    begun, ended = [record.getMessage() for record in caplog.records]
    assert begun == "PostgreSQL: by peer; retrying for up to 60 s"
    assert ended.startswith("PostgreSQL: recovered after ")


async def test_conflicts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    attempts = Attempts(asyncpg.SerializationError("x"), asyncpg.DeadlockDetectedError("x"))
    assert await Retry(60).run(attempts) == "done"
    assert caplog.records == []
