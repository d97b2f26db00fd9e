"""Read replicas: what a process can do that has the address of a hot standby, and what it says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import httpx
import pytest
import sqlalchemy as sa
from taskiq import TaskiqMessage

from taskiq_sa_pg import (
    SchemaError,
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    StorageError,
    TaskStatus,
)
from taskiq_sa_pg.timings import DEFAULT_TIMINGS
from taskiq_sa_pg.ui import dashboard
from taskiq_sa_pg.waiting import Listener
from tests.commands import run_taskiq_sa_pg
from tests.conftest import eventually
from tests.faults.conftest import Start
from tests.faults.servers import Programs, Server, ask, dsn_of, servers
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

SESSION: Final = sa.select(sa.func.pg_backend_pid())
IN_RECOVERY: Final = sa.select(sa.func.pg_is_in_recovery())

# Nobody looks before the test has ended: who is woken was told.
# A probe has as long to arrive, also on a busy machine.
UNLOOKED: Final = replace(DEFAULT_TIMINGS, between_looks=600, between_probes=0.5)
OFTEN: Final = replace(DEFAULT_TIMINGS, first_reconnect=0.02, last_reconnect=0.1)


@dataclass
class Pair:
    """A primary, and the server that follows it until it is promoted."""

    primary: Server
    standby: Server
    is_following: bool = False

    async def follow(self) -> None:
        if not self.is_following:
            await asyncio.to_thread(self.primary.start)
            await asyncio.to_thread(self.standby.make_standby_of, self.primary)
            self.is_following = True

    async def promote(self) -> None:
        self.is_following = False
        await asyncio.to_thread(self.standby.promote)


@pytest.fixture(scope="module")
def two_servers(programs: Programs) -> Iterator[Pair]:
    """The tables are those of everything that there is: statuses, workers, and the queue."""
    with servers(programs, 2) as [primary, standby]:
        provisioned = run_taskiq_sa_pg("upgrade", "--queue", "--dsn", primary.dsn)
        assert provisioned.exit_code == 0, provisioned.output
        yield Pair(primary, standby)


@pytest.fixture
async def pair(two_servers: Pair) -> Pair:
    await two_servers.follow()
    return two_servers


@pytest.fixture
async def writer(pair: Pair) -> AsyncIterator[Backend]:
    """A backend on the primary."""
    backend = Backend(pair.primary.dsn, track="started")
    await backend.startup()
    backend.runtime.writer.awaits_middleware = False  # tests store what it would
    yield backend
    await backend.shutdown()


async def caught_up(pair: Pair) -> None:
    """Returns when the standby shows what the primary has committed."""
    [[at]] = await ask(pair.primary.dsn, "SELECT pg_current_wal_lsn()::text")

    async def is_there() -> bool:
        [[there]] = await ask(
            pair.standby.dsn, "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", at
        )
        return bool(there)

    await eventually(is_there)


async def until_it_is(backend: Backend, state: str) -> None:
    async def is_so() -> bool:
        return backend.stats().listener == state

    await eventually(is_so)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("taskiq_sa_pg.")]
    return [record.getMessage() for record in ours if record.levelname == "WARNING"]


async def session_of(backend: Backend) -> int:
    """The server's process that runs the statements of a backend with one connection."""
    [[pid]] = await backend.runtime.database.fetch(SESSION, {}, "see which one it is")
    assert isinstance(pid, int)
    return pid


async def test_a_replica_alone_is_looked_at_and_one_warning_says_what_it_is(
    pair: Pair, writer: Backend, driver: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Promoted, it hears and stores like any other server."""
    reader = await start(pair.standby.dsn, driver=driver, timings=OFTEN)
    stored, later = new_id(), new_id()
    waiting = [asyncio.create_task(reader.wait_result(i, timeout=30)) for i in (stored, later)]
    await until_it_is(reader, "replica")
    await writer.set_result(stored, result_of(1))
    assert (await waiting[0]).return_value == 1
    [warning] = warnings_of(caplog)
    assert "is a read replica (a hot standby), which has no notifications" in warning
    assert "polled ten times a second" in warning
    assert "set listen_dsn= to the primary's address" in warning
    assert reader.stats().retries == 0
    await pair.promote()
    await until_it_is(reader, "listening")
    await reader.set_result(later, result_of(2))
    assert (await waiting[1]).return_value == 2
    assert warnings_of(caplog) == [warning]


async def test_listen_dsn_of_the_primary_wakes_who_reads_a_replica(
    pair: Pair, writer: Backend, driver: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The probes leave the connections to the replica alone, and no error in its log."""
    before = pair.standby.log
    reader = await start(
        pair.standby.dsn,
        driver=driver,
        listen_dsn=pair.primary.dsn.replace("postgresql:", f"postgresql+{driver}:"),
        max_connections=1,
        timings=UNLOOKED,
    )
    session = await session_of(reader)
    task_id = new_id()
    waiting = asyncio.create_task(reader.wait_result(task_id, timeout=30))
    await until_it_is(reader, "listening")
    listener = reader.runtime.listener
    for _ in range(3):
        await has_probed_again(listener)
    await writer.set_result(task_id, result_of(1))
    assert (await waiting).return_value == 1
    assert await session_of(reader) == session
    assert warnings_of(caplog) == []
    assert "ERROR" not in pair.standby.log.removeprefix(before)


async def has_probed_again(listener: Listener) -> None:
    probe = listener.probes[-1]

    async def has_another() -> bool:
        return listener.probes[-1] != probe and listener.is_healthy

    await eventually(has_another)


async def test_what_the_replica_gets_after_the_notification_is_found_soon(
    pair: Pair, writer: Backend, start: Start
) -> None:
    """Nothing else would find it: of looks for all there is one in ten minutes."""
    reader = await start(pair.standby.dsn, listen_dsn=pair.primary.dsn, timings=UNLOOKED)
    task_id, config = new_id(), reader.models.config
    result = asyncio.create_task(reader.wait_result(task_id, timeout=30))
    progress = aiter(reader.watch_progress(task_id, timeout=30))
    first = asyncio.ensure_future(anext(progress))
    await until_it_is(reader, "listening")
    await has_probed_again(reader.runtime.listener)
    heard = asyncio.Queue[str]()
    channels = [config.results_channel, config.progress_channel]
    reader.runtime.listener.add(channels, lambda channel, _: heard.put_nowait(channel), list)
    await ask(pair.standby.dsn, "SELECT pg_wal_replay_pause()")
    await writer.set_progress(task_id, progress_of(50))
    await writer.set_result(task_id, result_of(1))
    assert {await heard.get(), await heard.get()} == {*channels}
    assert await reader.get_progress(task_id) is None
    assert not await reader.is_result_ready(task_id)
    await ask(pair.standby.dsn, "SELECT pg_wal_replay_resume()")
    assert (await result).return_value == 1
    assert (await first).meta == 50
    assert [each async for each in progress] == []


WRITES: dict[str, Callable[[Backend], Awaitable[object]]] = {
    "set_result": lambda backend: backend.set_result("task", result_of(1)),
    "set_progress": lambda backend: backend.set_progress("task", progress_of(1)),
    "set_status": lambda backend: backend.set_status(TaskStatus("task", "queued")),
    "get_result, not kept": lambda backend: backend.get_result("task"),
    "get_results, not kept": lambda backend: backend.get_results(["task"]),
    "forget": lambda backend: backend.forget(["task"]),
    "prune": lambda backend: backend.prune(),
}


async def test_what_writes_names_the_remedy(
    pair: Pair, writer: Backend, driver: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """At once in the log, and as an error when it has been tried for retry_timeout."""
    reader = await start(
        pair.standby.dsn,
        driver=driver,
        keep_results=False,
        track="started",
        retry_timeout=0.1,
        timings=replace(DEFAULT_TIMINGS, status_retry=0.5),
    )
    reader.runtime.writer.awaits_middleware = False
    await writer.set_result("task", result_of(1))
    await caught_up(pair)
    for name, write in WRITES.items():
        caplog.clear()
        with pytest.raises(StorageError, match="keep_results=True") as caught:
            await write(reader)
        assert caught.value.sqlstate == "25006", name
        for text in (str(caught.value), *warnings_of(caplog)):
            assert "is a read replica (a hot standby)" in text, name
            assert "target_session_attrs=read-write" in text, name
        assert await reader.is_result_ready("task"), name  # which ends the outage
    broker = SQLAlchemyBroker(pair.standby.dsn, retry_timeout=0).with_result_backend(reader)
    await broker.startup()
    message = TaskiqMessage(
        task_id="task", task_name="shop:pay", labels={}, args=[], kwargs={}, labels_types={}
    )
    with pytest.raises(StorageError, match="is a read replica"):
        await broker.kick(broker.formatter.dumps(message))
    await broker.shutdown()
    for command in (["prune"], ["discard", "task"], ["upgrade", "--table-name=others"]):
        arguments = (*command, "--dsn", pair.standby.dsn)
        result = await asyncio.to_thread(run_taskiq_sa_pg, *arguments)
        assert result.exit_code == 1, result.output
        assert "is a read replica (a hot standby)" in result.stderr


async def test_all_that_reads_can_read_a_replica(
    pair: Pair, writer: Backend, driver: str, start: Start
) -> None:
    """Startup with run_migrations, too, as long as there is nothing to migrate."""
    before = pair.standby.log
    await writer.set_progress("done", progress_of(100))
    await writer.set_result("done", result_of(1))
    await writer.set_status(TaskStatus("running", "started"))
    await caught_up(pair)
    reader = await start(
        pair.standby.dsn, driver=driver, track="started", run_migrations=True, retry_timeout=0
    )
    broker = SQLAlchemyBroker(pair.standby.dsn, run_migrations=True, retry_timeout=0)
    await broker.with_result_backend(reader).startup()
    assert (await reader.wait_result("done")).return_value == 1
    assert set(await reader.get_results(["done"])) == {"done"}
    assert [meta.meta async for meta in reader.watch_progress("done")] == [100]
    assert (await reader.get_status("running")).state == "started"
    assert [each.task_id for each in await reader.get_running()] == ["running"]
    assert "done" in [each.task_id for each in (await reader.find()).records]
    assert "done" in [task_id async for task_id, _ in reader.iter_results()]
    assert (await reader.get_details("done", with_result=True)).result is not None
    assert (await reader.runtime.pruner.count()).is_complete
    assert await reader.get_workers() == []
    app = dashboard(reader, broker=broker, authorize=lambda _: "read")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tasks.test/") as client:
        for page in ("", "tasks", "workers", "queues", "parked", "schedules", "task?id=done"):
            assert (await client.get(page)).status_code == 200, page
    await broker.shutdown()
    for command in ("check", "current", "list", "stats", "running", "queue", "parked"):
        result = await asyncio.to_thread(run_taskiq_sa_pg, command, "--dsn", pair.standby.dsn)
        note = "no parked tasks\n" if command == "parked" else ""
        assert (result.exit_code, result.stderr) == (0, note), result.output
    assert "ERROR" not in pair.standby.log.removeprefix(before)


async def test_tables_are_not_made_on_a_replica(pair: Pair) -> None:
    backend = Backend(
        pair.standby.dsn, table_name="others", run_migrations=True, startup_timeout=0.1
    )
    with pytest.raises(SchemaError, match=r"is a read replica .* Do this on the primary"):
        await backend.startup()
    await backend.shutdown()


async def test_after_a_failover_who_reads_and_listens_finds_the_new_primary(
    pair: Pair, driver: str, start: Start
) -> None:
    hosts = (pair.primary.port, pair.standby.port)
    reader = await start(
        dsn_of(*hosts, options="?target_session_attrs=prefer-standby"),
        driver=driver,
        listen_dsn=dsn_of(*hosts, options="?target_session_attrs=read-write"),
        timings=OFTEN,
    )
    [[is_at_replica]] = await reader.runtime.database.fetch(IN_RECOVERY, {}, "see where it is")
    assert is_at_replica
    task_id = new_id()
    waiting = asyncio.create_task(reader.wait_result(task_id, timeout=30))
    await until_it_is(reader, "listening")
    await asyncio.to_thread(pair.primary.stop)
    await until_it_is(reader, "connecting")
    await pair.promote()
    await until_it_is(reader, "listening")
    await reader.set_result(task_id, result_of(1))
    assert (await waiting).return_value == 1
