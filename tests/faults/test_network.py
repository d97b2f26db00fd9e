"""Networks that cut, refuse, delay and swallow, and servers that stop answering."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from taskiq_sa_pg import StorageError
from tests.conftest import eventually
from tests.faults.conftest import Start
from tests.faults.load import under_load
from tests.faults.proxy import Proxy, proxied
from tests.faults.servers import Server, ask, dsn_of
from tests.tasks import new_id, result_of


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with proxied(server.port) as proxy:
        yield proxy


async def fall_silent(proxy: Proxy) -> None:
    """Swallows for 5 s; the connections of that time stay dead."""
    proxy.is_silent = True
    await asyncio.sleep(5)
    proxy.is_silent = False


async def cut_often(proxy: Proxy) -> None:
    for _ in range(20):
        proxy.cut()
        await asyncio.sleep(0.1)


async def refuse(proxy: Proxy) -> None:
    await proxy.refuse()
    await asyncio.sleep(2)
    await proxy.open(proxy.port)


async def slow_down(proxy: Proxy) -> None:
    proxy.delay = 0.2
    await asyncio.sleep(3)
    proxy.delay = 0


FAULTS: dict[str, Callable[[Proxy], Awaitable[None]]] = {
    "silence": fall_silent,
    "cuts": cut_often,
    "refusal": refuse,
    "delay": slow_down,
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_result_is_lost_and_no_waiter_fails(
    fault: str, server: Server, proxy: Proxy, driver: str, start: Start
) -> None:
    backend = await start(dsn_of(proxy.port), driver=driver, command_timeout=2)
    account = await under_load(backend, lambda: FAULTS[fault](proxy))
    await account.assert_nothing_lost(server.dsn)
    # A connection that fell silent is noticed by its time limit, and given up a second later; the
    # other seconds are for a busy machine.
    assert account.seconds_to_recover < 10


async def test_a_server_that_stands_still_is_noticed(
    server: Server, driver: str, start: Start
) -> None:
    """Its kernel goes on acknowledging, so only the time limit tells."""
    backend = await start(server.dsn, driver=driver, command_timeout=1, retry_timeout=1)
    await backend.set_result("before", result_of(1))
    await asyncio.to_thread(server.freeze)
    try:
        async with asyncio.timeout(8):
            with pytest.raises(StorageError, match="did not answer in time"):
                await backend.set_result("task", result_of(1))
    finally:
        await asyncio.to_thread(server.freeze, signal.SIGCONT)
    await backend.set_result("task", result_of(2))
    assert (await backend.get_result("task")).return_value == 2


async def test_asyncpg_s_own_limit_counts_where_it_is_the_shorter(
    server: Server, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a statement on a connection that is kept, too."""
    backend = await start(f"{server.dsn}?command_timeout=1", command_timeout=60)
    await backend.set_result("before", result_of(1))
    await asyncio.to_thread(server.freeze)

    async def is_noticed() -> bool:
        return "no answer in time; trying again" in caplog.text

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
    async with backend._store.listening() as connection:
        if driver == "asyncpg":
            peer = connection._transport.get_extra_info("socket")
        else:
            peer = socket.socket(fileno=os.dup(connection.pgconn.socket))
        option = peer.getsockopt
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        if driver == "psycopg":
            peer.close()


async def test_startup_has_a_limit_of_its_own(proxy: Proxy, driver: str, start: Start) -> None:
    proxy.is_silent = True
    async with asyncio.timeout(20):
        with pytest.raises(StorageError, match="up to date: PostgreSQL did not answer in time"):
            await start(dsn_of(proxy.port), driver=driver, command_timeout=1, startup_timeout=1)


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_what_is_read_behind_a_lost_commit_is_returned(
    server: Server, proxy: Proxy, driver: str, start: Start, keep_results: bool
) -> None:
    """The COMMIT of a deleting read arrives, and its answer does not."""
    writer = await start(server.dsn)
    reader = await start(dsn_of(proxy.port), driver=driver, keep_results=keep_results)
    for _ in range(5):
        task_id = new_id()
        await writer.set_result(task_id, result_of("only once"))
        lost = 0

        def lose_commit(piece: bytes) -> bool:
            nonlocal lost
            if lost or b"COMMIT" not in piece.replace(b"COMMITTED", b""):
                return True
            lost += 1
            return False

        proxy.watch = lose_commit
        result = await reader.get_result(task_id)
        proxy.watch = None
        assert result.return_value == "only once"
        assert lost == (0 if keep_results else 1)
        rows = await ask(server.dsn, "SELECT FROM taskiq_results WHERE task_id = $1", task_id)
        assert len(rows) == (1 if keep_results else 0)


async def test_a_result_whose_answer_was_lost_is_stored_once(
    server: Server, proxy: Proxy, driver: str, start: Start
) -> None:
    backend = await start(dsn_of(proxy.port), driver=driver)
    lost = 0

    def lose_insert(piece: bytes) -> bool:
        nonlocal lost
        if lost or b"the value" not in piece:
            return True
        lost += 1
        return False

    proxy.watch = lose_insert
    await backend.set_result("task", result_of("the value"))
    assert lost == 1
    assert (await backend.get_result("task")).return_value == "the value"


async def test_calls_that_pile_up_in_an_outage_stay_bounded(
    proxy: Proxy, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """They wait unencoded, for the few connections that there are."""
    backend = await start(dsn_of(proxy.port), command_timeout=2)
    await backend.set_result("before", result_of(1))
    await proxy.refuse()
    calls = [asyncio.ensure_future(backend.set_result(new_id(), result_of(i))) for i in range(5000)]

    async def are_tried_again() -> bool:
        return "trying again" in caplog.text

    await eventually(are_tried_again)
    pending = backend._parts.operations._results._pending.values()
    assert len(pending) > 3000
    assert not any(hasattr(entry, "row") for entry in pending)
    await proxy.open(proxy.port)
    assert await asyncio.gather(*calls) == [None] * len(calls)
    assert proxy.most_connections <= 4


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_callers_that_give_up_in_an_outage_leave_nothing_behind(
    server: Server, proxy: Proxy, driver: str, start: Start, keep_results: bool
) -> None:
    backend = await start(
        dsn_of(proxy.port), driver=driver, keep_results=keep_results, command_timeout=2
    )
    await backend.set_result("kept", result_of(1))
    proxy.is_silent = True
    for call in (
        lambda: backend.set_result("other", result_of(2)),
        lambda: backend.get_result("kept"),
        lambda: backend.is_result_ready("kept"),
        lambda: backend.wait_result("other"),
    ):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await call()
    proxy.is_silent = False
    assert (await backend.get_result("kept")).return_value == 1
