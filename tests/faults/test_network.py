"""Networks that cut, refuse, delay and swallow, and servers that stop answering."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import psutil
import pytest
from taskiq.serializers import PickleSerializer

from taskiq_sa_pg import StorageError
from tests.conftest import eventually
from tests.faults.conftest import Start, by_turns
from tests.faults.load import OFTEN, under_load
from tests.faults.outages import cut_often, fall_silent, refuse, slow_down
from tests.faults.proxy import LoseOnce, Proxy, proxied
from tests.faults.servers import Server, ask, dsn_of
from tests.tasks import new_id, result_of

FAULTS: dict[str, Callable[[Proxy], Awaitable[None]]] = {
    "silence": fall_silent,
    "cuts": cut_often,
    "refusal": refuse,
    "delay": slow_down,
}


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with proxied(server.port) as proxy:
        yield proxy


@by_turns(FAULTS)
async def test_no_result_is_lost_and_no_waiter_fails(
    fault: str, driver: str, is_borrowed: bool, proxy: Proxy, start: Start
) -> None:
    backend = await start(
        dsn_of(proxy.port),
        driver=driver,
        is_borrowed=is_borrowed,
        command_timeout=0.6,
        timings=OFTEN,
    )
    account = await under_load(backend, lambda: FAULTS[fault](proxy))
    await account.assert_nothing_lost(dsn_of(proxy.target_port))
    # A connection that fell silent is noticed by its time limit, and given up a second later; the
    # other seconds are for a busy machine.
    assert account.seconds_to_recover < 10


async def test_a_server_that_stands_still_is_noticed(
    server: Server, driver: str, start: Start
) -> None:
    """Its kernel goes on acknowledging, so only the time limit tells."""
    backend = await start(server.dsn, driver=driver, command_timeout=0.3, retry_timeout=0.3)
    await backend.set_result("before", result_of(1))
    await asyncio.to_thread(server.freeze)
    try:
        async with asyncio.timeout(6):
            with pytest.raises(StorageError, match="did not answer in time"):
                await backend.set_result("task", result_of(1))
    finally:
        await asyncio.to_thread(server.freeze, signal.SIGCONT)
    await backend.set_result("task", result_of(2))
    assert (await backend.get_result("task")).return_value == 2


async def test_a_server_that_stands_still_holds_up_no_shutdown(
    server: Server, driver: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    # A notification on its way would be waited for, as long as for any statement.
    backend = await start(server.dsn, driver=driver, notify=False)
    await backend.set_result("task", result_of(1))
    await asyncio.to_thread(server.freeze)
    try:
        async with asyncio.timeout(30):
            await backend.shutdown()
    finally:
        await asyncio.to_thread(server.freeze, signal.SIGCONT)
    caplog.clear()  # SQLAlchemy tells of a connection that could not be closed


async def test_asyncpg_s_own_limit_counts_where_it_is_the_shorter(
    server: Server, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a statement on a connection that is kept, too."""
    # No notification takes the connection meanwhile.
    dsn = f"{server.dsn}?command_timeout=0.3"
    backend = await start(dsn, command_timeout=60, notify=False)
    await backend.set_result("before", result_of(1))
    await asyncio.to_thread(server.freeze)

    async def is_noticed() -> bool:
        return "no answer in time; retrying" in caplog.text

    try:
        storing = asyncio.create_task(backend.set_result("task", result_of(2)))
        await eventually(is_noticed)
    finally:
        await asyncio.to_thread(server.freeze, signal.SIGCONT)
    await storing
    assert (await backend.get_result("task")).return_value == 2


async def test_a_peer_that_acknowledges_nothing_is_noticed_by_the_kernel(
    server: Server, driver: str, start: Start
) -> None:
    """A connection that nobody uses, such as the listening one, has no other limit."""
    backend = await start(server.dsn, driver=driver)
    async with backend.runtime.database.listening():
        await backend.set_result("task", result_of(1))
        peers = sockets_to(server.port)
        assert len(peers) == 2
        for peer in peers:
            with peer:
                option = peer.getsockopt
                assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
                assert option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
                assert option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
                assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000


def sockets_to(port: int) -> list[socket.socket]:
    """This process's connections to a port of this machine."""
    connections = psutil.Process().net_connections("tcp4")
    return [socket.socket(fileno=os.dup(c.fd)) for c in connections if c.raddr[1:] == (port,)]


@pytest.mark.parametrize("run_migrations", [False, True])
async def test_the_limit_of_startup_bounds_the_whole(
    proxy: Proxy, driver: str, start: Start, run_migrations: bool
) -> None:
    """However long one attempt could take: 30 s, and as long again."""
    proxy.is_silent = True
    said = rf"PostgreSQL did not answer in time \(at 127.0.0.1:{proxy.port}\)"
    async with asyncio.timeout(6):
        with pytest.raises(StorageError, match=said):
            await start(
                dsn_of(proxy.port),
                driver=driver,
                run_migrations=run_migrations,
                startup_timeout=0.3,
            )


async def test_after_a_silence_that_outlasts_the_retries_there_is_no_other_attempt(
    server: Server, proxy: Proxy, driver: str, start: Start
) -> None:
    backend = await start(
        dsn_of(proxy.port), driver=driver, command_timeout=0.4, retry_timeout=0.2, notify=False
    )
    proxy.is_silent = True
    with pytest.raises(StorageError, match="did not answer in time"):
        await backend.set_result("task", result_of(1))
    assert backend.stats().retries == 0


async def test_a_connection_s_error_says_to_where(proxy: Proxy, driver: str, start: Start) -> None:
    await proxy.refuse()
    with pytest.raises(StorageError, match=rf"at 127.0.0.1:{proxy.port}\)"):
        await start(dsn_of(proxy.port), driver=driver, startup_timeout=0)


async def test_a_host_that_nobody_knows_is_named(driver: str, start: Start) -> None:
    dsn = dsn_of(1).replace("127.0.0.1", "mistyped.invalid")
    with pytest.raises(StorageError, match=r"mistyped\.invalid:1"):
        await start(dsn, driver=driver, startup_timeout=0)


async def test_what_is_read_behind_a_lost_commit_is_returned(
    server: Server, proxy: Proxy, driver: str, start: Start
) -> None:
    """The COMMIT of a deleting read arrives, and its answer does not. Other reads have none."""
    writer = await start(server.dsn)
    keeper, taker = [
        await start(dsn_of(proxy.port), driver=driver, keep_results=is_kept)
        for is_kept in (True, False)
    ]
    for task_id in ("first", "second"):
        await writer.set_result(task_id, result_of("only once"))
        proxy.watch = lose_commit = LoseOnce(
            lambda piece: b"COMMIT" in piece.replace(b"COMMITTED", b"")
        )
        assert (await keeper.get_result(task_id)).return_value == "only once"
        assert not lose_commit.has_lost
        assert (await taker.get_result(task_id)).return_value == "only once"
        assert lose_commit.has_lost
        assert not await ask(server.dsn, "SELECT FROM taskiq_results")


async def test_a_result_whose_answer_was_lost_is_stored_once(
    server: Server, proxy: Proxy, driver: str, start: Start
) -> None:
    backend = await start(dsn_of(proxy.port), driver=driver)
    proxy.watch = lose_insert = LoseOnce(lambda piece: b"the value" in piece)
    await backend.set_result("task", result_of("the value"))
    assert lose_insert.has_lost
    assert (await backend.get_result("task")).return_value == "the value"


class CountingSerializer(PickleSerializer):
    """Counts what it encodes."""

    count = 0

    def dumpb(self, value: Any) -> bytes:
        self.count += 1
        return super().dumpb(value)


async def test_calls_that_pile_up_in_an_outage_stay_bounded(
    proxy: Proxy, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """They wait unencoded, for the few connections that there are."""
    serializer = CountingSerializer()
    backend = await start(dsn_of(proxy.port), serializer=serializer, command_timeout=2)
    await backend.set_result("before", result_of(1))
    await proxy.refuse()
    calls = [asyncio.ensure_future(backend.set_result(new_id(), result_of(i))) for i in range(5000)]

    async def are_tried_again() -> bool:
        return "retrying" in caplog.text

    await eventually(are_tried_again)
    assert backend.stats().operations["set_result"].pending == 5000
    assert serializer.count < 2000
    await proxy.open(proxy.port)
    assert await asyncio.gather(*calls) == [None] * len(calls)
    assert proxy.most_connections <= 4


async def test_callers_that_give_up_in_an_outage_leave_nothing_behind(
    proxy: Proxy, driver: str, start: Start
) -> None:
    backends = [
        await start(dsn_of(proxy.port), driver=driver, keep_results=is_kept, command_timeout=0.5)
        for is_kept in (True, False)
    ]
    for backend in backends:
        await backend.set_result("kept", result_of(1))
    proxy.is_silent = True
    calls = [
        call
        for backend in backends
        for call in (
            partial(backend.set_result, "other", result_of(2)),
            partial(backend.get_result, "kept"),
            partial(backend.is_result_ready, "kept"),
            partial(backend.wait_result, "other"),
        )
    ]
    for call in calls:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await call()
    proxy.is_silent = False
    for backend in backends:
        assert (await backend.get_result("kept")).return_value == 1
