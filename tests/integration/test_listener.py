"""The listening connection: one, proven, outside of the pool; lost, unreachable or deaf."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import psycopg
import pytest
from sqlalchemy import NullPool

from taskiq_sa_pg import ConfigurationError, SQLAlchemyResultBackend
from taskiq_sa_pg.database import Database as Connected
from taskiq_sa_pg.timings import Timings
from taskiq_sa_pg.waiting import Notifier
from tests.conftest import engine_of, eventually
from tests.integration.waiters import (
    SOON,
    Backend,
    Backends,
    channel_of,
    heard_by,
    insert,
    listener_of,
    table_of,
    until_healthy,
    until_waiting,
    waiters_of,
)
from tests.tasks import new_id, result_of


async def terminate(backends: Backends) -> None:
    """Ends the session of the listening connection, at the server."""
    [pid] = await backends.listening()
    await backends.database.fetch("SELECT pg_terminate_backend($1)", pid)


async def until_unhealthy(backend: Backend) -> None:
    async def is_unhealthy() -> bool:
        return not listener_of(backend).is_healthy

    await eventually(is_unhealthy)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "taskiq_sa_pg.waiting.listener" and record.levelname == "WARNING"
    ]


async def test_one_connection_listens_from_the_first_waiter_to_shutdown(
    each_driver: Backends,
) -> None:
    backend = await each_driver.start()
    await backend.set_result("there", result_of(1))
    assert await backend.is_result_ready("there")
    assert await backend.get_progress("there") is None
    assert await each_driver.listening() == []
    waiting = [asyncio.create_task(backend.wait_result(new_id())) for _ in range(10)]
    await until_healthy(backend)
    listening = await each_driver.listening()
    assert len(listening) == 1
    for waiter in waiting:
        waiter.cancel()
    await asyncio.wait(waiting)
    await backend.wait_results(["there"])
    assert await each_driver.listening() == listening
    await backend.shutdown()

    async def is_closed() -> bool:
        return await each_driver.database.sessions(each_driver.name) == []

    await eventually(is_closed)


async def test_a_backend_that_starts_again_listens_again(each_driver: Backends) -> None:
    backend = await each_driver.start()
    for _ in range(2):
        await backend.startup()
        async with heard_by(backend):
            assert len(await each_driver.listening()) == 1
        await backend.shutdown()


@pytest.mark.parametrize("is_borrowed", [False, True], ids=["owned", "borrowed"])
async def test_listening_takes_no_place_in_the_pool(
    each_driver: Backends, is_borrowed: bool
) -> None:
    timings = Timings(keep_connection=0.05)
    backend = await each_driver.start(is_borrowed=is_borrowed, pool_size=1, timings=timings)
    async with heard_by(backend):
        assert len(await each_driver.listening()) == 1

        async def is_free() -> bool:
            pool: Any = engine_of(backend).pool
            return bool(pool.checkedout() == 0)

        await eventually(is_free)
        async with asyncio.timeout(SOON), engine_of(backend).connect():
            assert len(await each_driver.database.sessions(each_driver.name)) == 2


async def test_without_notify_nobody_listens(each_driver: Backends) -> None:
    backend = await each_driver.start(notify=False)
    waiting = asyncio.create_task(backend.wait_result("never"))
    await until_waiting(backend)
    for _ in range(3):
        assert await backend.is_result_ready("never") is False
    assert await each_driver.listening() == []
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await each_driver.listening() == []


async def test_a_lost_connection_comes_back_by_itself(
    each_driver: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    """What was stored in between is found, and what is stored afterwards is heard."""
    backend = await each_driver.start(timings=Timings(first_reconnect=0.01))
    in_the_gap, afterwards = new_id(), new_id()
    waiting = [
        asyncio.create_task(backend.wait_result(i, timeout=SOON)) for i in (in_the_gap, afterwards)
    ]
    await until_healthy(backend)
    await until_waiting(backend, 2)
    for _ in range(2):
        await terminate(each_driver)
        await until_unhealthy(backend)
        await until_healthy(backend)
    await terminate(each_driver)
    await until_unhealthy(backend)
    await insert(each_driver.database, in_the_gap, "there")
    assert (await waiting[0]).return_value == "there"
    await until_healthy(backend)
    waiters_of(backend).look = see_nothing
    await until_waiting(backend, 1)
    await backend.set_result(afterwards, result_of("heard"))
    assert (await waiting[1]).return_value == "heard"
    assert len(await each_driver.listening()) == 1
    assert [text.count("the connection was lost") for text in warnings_of(caplog)] in (
        [1] * 3,
        [0] * 3,  # psycopg raises what the server said
    )


async def see_nothing() -> None: ...


async def test_becoming_healthy_makes_up_for_what_was_not_heard(each_driver: Backends) -> None:
    """Without the look that this makes, nobody would look for a thousand seconds."""
    timings = Timings(between_looks=1000, between_unheard_looks=1000)
    backend = await each_driver.start(timings=timings)
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
    await until_healthy(backend)
    await until_waiting(backend)
    await terminate(each_driver)
    await until_unhealthy(backend)
    await insert(each_driver.database, task_id, "there")
    assert (await waiting).return_value == "there"


@asynccontextmanager
async def deaf_connection(opened: Connected) -> AsyncIterator[Any]:
    """As of a transaction pooler: LISTEN is accepted, and nothing is ever delivered."""
    async with listening(opened) as connection:
        yield Deaf(connection)


listening = Connected.listening


@asynccontextmanager
async def replaying_connection(opened: Connected) -> AsyncIterator[Any]:
    """As of a transaction pooler whose servers still tell what others have listened for."""
    async with listening(opened) as connection:
        yield Replaying(connection)


class Deaf:
    """Listens to other channels than it was asked to."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        if hasattr(connection, "add_listener"):
            self.add_listener = self._add_listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def _add_listener(self, channel: str, callback: Any) -> None:
        await self._connection.add_listener(f"not {channel}", callback)

    async def execute(self, _statement: Any) -> None:
        await self._connection.execute("LISTEN nothing")


class Replaying(Deaf):
    """Tells what was sent before."""

    sent: ClassVar[list[tuple[str, str]]] = []

    async def _add_listener(self, channel: str, callback: Any) -> None:
        await super()._add_listener(channel, callback)
        for told_on, payload in self.sent:
            callback(self._connection, 1, told_on, payload)

    async def notifies(self) -> AsyncIterator[psycopg.Notify]:
        for told_on, payload in self.sent:
            yield psycopg.Notify(told_on, payload, 1)
        async for notification in self._connection.notifies():
            yield notification


async def send_and_note(notifier: Notifier, channel: str, payloads: list[str]) -> None:
    Replaying.sent += [(channel, payload) for payload in payloads]
    await send(notifier, channel, payloads)


send = Notifier.send


async def send_nothing(*_: Any) -> None: ...


@pytest.mark.parametrize("reason", ["pooler", "replay", "no probe"])
async def test_a_connection_that_delivers_nothing_is_never_healthy(
    each_driver: Backends,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    if reason == "pooler":
        monkeypatch.setattr(Connected, "listening", deaf_connection)
    elif reason == "replay":
        monkeypatch.setattr(Connected, "listening", replaying_connection)
        monkeypatch.setattr(Notifier, "send", send_and_note)
        monkeypatch.setattr(Replaying, "sent", [])
    else:
        monkeypatch.setattr(Notifier, "send", send_nothing)
    caplog.set_level("DEBUG", "taskiq_sa_pg.waiting.listener")
    timings = Timings(between_probes=0.03, first_reconnect=0.01, between_looks=1000)
    backend = await each_driver.start(timings=timings)
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
    was_healthy = []

    async def has_tried_three_times() -> bool:
        was_healthy.append(listener_of(backend).is_healthy)
        return caplog.text.count("delivers no notifications") >= 3

    await eventually(has_tried_three_times)
    assert True not in was_healthy
    [warning] = warnings_of(caplog)
    assert "delivers no notifications" in warning
    assert "listen_dsn=" in warning
    assert "notify=False" in warning
    await insert(each_driver.database, task_id, "there")
    assert (await waiting).return_value == "there"


async def test_a_connection_that_falls_silent_is_given_up(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is still there, but what is sent does not arrive: as after a network was cut."""
    is_silent = False
    send = Notifier.send

    async def send_unless_silent(*args: Any) -> None:
        if not is_silent:
            await send(*args)

    monkeypatch.setattr(Notifier, "send", send_unless_silent)
    backend = await each_driver.start(timings=Timings(between_probes=0.1, first_reconnect=0.01))
    async with heard_by(backend):
        [pid] = await each_driver.listening()
        is_silent = True
        await until_unhealthy(backend)
        is_silent = False
        await until_healthy(backend)
        assert await each_driver.listening() != [pid]
        assert "delivers no notifications" in warnings_of(caplog)[0]


async def test_an_event_loop_that_was_blocked_does_no_harm(each_driver: Backends) -> None:
    """The probe then arrives together with the end of the time that it had."""
    backend = await each_driver.start(timings=Timings(between_probes=0.04))
    async with heard_by(backend):
        channel, probe = channel_of(each_driver.database), listener_of(backend).probes[-1]
        with psycopg.connect(each_driver.database.direct_dsn, autocommit=True) as connection:
            for _ in range(2):
                connection.execute("SELECT pg_notify(%s, %s)", [channel, probe])
                time.sleep(0.1)  # noqa: ASYNC251 - somebody else's code
                await until_healthy(backend)


async def test_several_backends_listen_each_for_themselves(each_driver: Backends) -> None:
    """They hear each other's probes, which prove nothing."""
    one, other = [await each_driver.start() for _ in range(2)]
    async with heard_by(one), heard_by(other):
        assert len(await each_driver.listening()) == 2
        listener_of(other).is_healthy = False
        await one.runtime.notifier.send(
            channel_of(each_driver.database), [listener_of(one).probes[-1], json.dumps(["last"])]
        )
        async with asyncio.timeout(SOON):
            await one.set_result("last", result_of(1))
            await other.wait_result("last")
        assert not listener_of(other).is_healthy


UNREACHABLE = "postgresql://user:hunter2@localhost:1/database"


@pytest.mark.parametrize(
    "listen_dsn",
    [UNREACHABLE, "postgresql+psycopg://user:hunter2@localhost:1/database", lambda: UNREACHABLE],
    ids=["asyncpg", "psycopg", "callable"],
)
async def test_an_unreachable_listen_dsn_is_warned_of_once_and_waiting_looks(
    backends: Backends, caplog: pytest.LogCaptureFixture, listen_dsn: Any
) -> None:
    caplog.set_level("DEBUG", "taskiq_sa_pg.waiting.listener")
    backend = await backends.start(listen_dsn=listen_dsn, timings=Timings(first_reconnect=0.01))
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))

    async def has_tried_twice() -> bool:
        return caplog.text.count("cannot listen for notifications") >= 2

    await eventually(has_tried_twice)
    await backend.set_result(task_id, result_of(7))
    assert (await waiting).return_value == 7
    assert not listener_of(backend).is_healthy
    [warning] = warnings_of(caplog)
    assert "listen_dsn=" in warning
    assert "hunter2" not in caplog.text


async def test_a_listen_dsn_that_fails_to_be_told_is_tried_again(backends: Backends) -> None:
    answers = [ValueError("no secret yet"), UNREACHABLE, backends.direct_dsn()]

    def ask() -> str:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, str)
        return answer

    backend = await backends.start(listen_dsn=ask, timings=Timings(first_reconnect=0.01))
    async with heard_by(backend):
        assert answers == [backends.direct_dsn()]


@pytest.mark.parametrize("listens", ["asyncpg", "psycopg"])
@pytest.mark.usefixtures("blind")
async def test_listen_dsn_leads_the_listening_connection_alone(
    each_driver: Backends, listens: str
) -> None:
    other = Backends(each_driver.database, listens)
    backend = await each_driver.start(listen_dsn=other.direct_dsn())
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
    await until_healthy(backend)
    await until_waiting(backend)
    assert len(await other.listening()) == 1
    assert await each_driver.listening() == []
    await backend.set_result(task_id, result_of(7))
    assert (await waiting).return_value == 7
    await backend.shutdown()
    await other.close()


@pytest.mark.usefixtures("blind")
async def test_a_pool_without_places_can_listen(each_driver: Backends) -> None:
    backend = SQLAlchemyResultBackend[Any](
        each_driver.dsn(), table_name=table_of(each_driver.database), poolclass=NullPool
    )
    await backend.startup()
    async with heard_by(backend):
        await backend.set_result("pooled", result_of(7))
        assert (await backend.wait_result("pooled", timeout=SOON)).return_value == 7
    await backend.shutdown()


@pytest.mark.parametrize("notify", [True, False], ids=["notify", "silent"])
@pytest.mark.parametrize(
    ("listen_dsn", "said"),
    [
        ("mysql://user:hunter2@h/d", "mysql"),
        ("postgresql+psycopg2://user:hunter2@h/d", "psycopg2"),
        ("postgresql://user:hunter2@h:port/d", "percent-encoded"),
        (7, "not int"),
        (UNREACHABLE, None),
        (lambda: UNREACHABLE, None),
    ],
    ids=["dialect", "driver", "port", "type", "good", "callable"],
)
def test_a_listen_dsn_that_cannot_work_is_refused(listen_dsn: Any, said: str, notify: bool) -> None:
    if notify and said is None:
        Backend(UNREACHABLE, listen_dsn=listen_dsn)
        return
    match = said if notify else "listen_dsn needs notify=True"
    with pytest.raises(ConfigurationError, match=match) as caught:
        Backend(UNREACHABLE, listen_dsn=listen_dsn, notify=notify)
    assert "hunter2" not in str(caught.value)


def test_a_loop_that_ends_without_shutdown_ends_the_listening(each_driver: Backends) -> None:
    backend = Backend(
        each_driver.dsn(), table_name=table_of(each_driver.database), check_schema="off"
    )

    async def listen() -> None:
        await backend.startup()
        async with heard_by(backend):
            assert len(await each_driver.listening()) == 1

    for _ in range(2):
        asyncio.run(listen())
    asyncio.run(backend.shutdown())
