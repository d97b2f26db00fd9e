"""Event loops as applications have them: other ones, threads, tasks that are all cancelled."""

import asyncio
import sys
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Any

import pytest
from sqlalchemy import event
from taskiq import InMemoryBroker, TaskiqMessage

from taskiq_sa_pg import (
    NotStartedError,
    SQLAlchemyResultBackend,
    TaskMetadataMiddleware,
    TaskStatus,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database, eventually
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]


async def first_of(iterator: Any) -> Any:
    return await anext(iterator)


# Every public method that asks PostgreSQL.
CALLS: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    "set_result": lambda backend: backend.set_result("a", result_of(1)),
    "get_result": lambda backend: backend.get_result("a"),
    "get_results": lambda backend: backend.get_results(["a"]),
    "is_result_ready": lambda backend: backend.is_result_ready("a"),
    "wait_result": lambda backend: backend.wait_result("a", timeout=60),
    "wait_results": lambda backend: backend.wait_results(["a"], timeout=60),
    "as_completed": lambda backend: first_of(backend.as_completed(["a"], timeout=60)),
    "iter_results": lambda backend: first_of(backend.iter_results()),
    "set_progress": lambda backend: backend.set_progress("a", progress_of(1)),
    "get_progress": lambda backend: backend.get_progress("a"),
    "watch_progress": lambda backend: first_of(backend.watch_progress("a", timeout=60)),
    "set_status": lambda backend: backend.set_status(TaskStatus("a", "queued")),
    "get_status": lambda backend: backend.get_status("a"),
    "get_running": lambda backend: backend.get_running(),
    "forget": lambda backend: backend.forget(["a"]),
    "prune": lambda backend: backend.prune(),
}


async def refusals(backend: Backend) -> dict[str, str]:
    """What each method says, at once."""
    said = {}
    for name, call in CALLS.items():
        async with asyncio.timeout(2):
            with pytest.raises(NotStartedError) as caught:
                await call(backend)
        said[name] = str(caught.value)
    return said


def test_every_method_refuses_another_event_loop_at_once(database: Database) -> None:
    backend = Backend(database.dsn, run_migrations=True, track="started")
    first = asyncio.new_event_loop()
    first.run_until_complete(backend.startup())
    first.run_until_complete(backend.set_result("a", result_of(1)))
    first.run_until_complete(end_as_asyncio_run_does())
    said = asyncio.run(refusals(backend))
    assert set(said) == set(CALLS)
    for text in said.values():
        assert repr(first) in text
        assert "call `await startup()` on this one" in text
    # The remedy: the other loop has ended its run.
    asyncio.run(use_again(backend))
    first.close()


async def end_as_asyncio_run_does() -> None:
    await cancel_all_others()
    await asyncio.get_running_loop().shutdown_asyncgens()


async def use_again(backend: Backend) -> None:
    await backend.startup()
    assert (await backend.get_result("a")).return_value == 1
    await backend.shutdown()


async def test_a_thread_s_event_loop_is_refused_and_cannot_take_the_backend_over(
    start_backend: BackendFactory,
) -> None:
    backend: Backend = await start_backend(track="started")
    await backend.set_result("a", result_of(1))
    outcome: list[Any] = []

    async def elsewhere() -> None:
        outcome.append(await refusals(backend))
        with pytest.raises(
            NotStartedError, match=r"still runs.*create a broker or result backend for each"
        ):
            await backend.startup()

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert set(outcome[0]) == set(CALLS)
    assert (await backend.get_result("a")).return_value == 1


def test_a_task_may_be_sent_from_another_event_loop(database: Database) -> None:
    """By a broker that bears it: the middleware asks the backend nothing without track=."""
    backend = Backend(database.dsn, run_migrations=True)
    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware())
    message = TaskiqMessage(task_id="a", task_name="task", labels={}, args=[], kwargs={})

    async def start() -> None:
        await backend.startup()
        await end_as_asyncio_run_does()

    asyncio.run(start())
    sent = asyncio.run(broker.middlewares[0].pre_send(message))  # type: ignore[arg-type]
    assert sent is message
    asyncio.run(backend.shutdown())


async def cancel_all_others() -> None:
    """As a server does before it ends."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("turns", range(5))
async def test_after_all_tasks_were_cancelled_shutdown_returns(
    database: Database, turns: int, number: int
) -> None:
    """Those among them that had not begun."""
    backend = Backend(database.dsn, run_migrations=True, prune_interval=3600)
    await backend.startup()
    waiting = asyncio.create_task(backend.wait_result("never"))
    if number == 1:  # stored in this task, so its notification has yet to begin
        await backend.set_result("task", result_of(1))
    else:
        calls = [backend.set_result(new_id(), result_of(i)) for i in range(number)]
        await asyncio.wait(map(asyncio.create_task, calls), return_when="FIRST_COMPLETED")
    for _ in range(turns):
        await asyncio.sleep(0)
    await cancel_all_others()
    assert waiting.cancelled()
    # What hangs would keep the event loop busy, and no time limit of asyncio's would end it.
    await backend.shutdown()


@pytest.mark.parametrize("turns", range(3))
async def test_a_backend_goes_on_after_all_tasks_were_cancelled(
    start_backend: BackendFactory, turns: int
) -> None:
    backend: Backend = await start_backend(prune_interval=3600)
    await backend.set_result("task", result_of(1))
    for _ in range(turns):
        await asyncio.sleep(0)
    await cancel_all_others()
    assert not backend.runtime.pruner.is_running
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=20))
    await backend.set_result(task_id, result_of("later"))
    assert (await waiting).return_value == "later"
    assert backend.runtime.pruner.is_running


REQUEST: ContextVar[str] = ContextVar("REQUEST")


async def test_what_runs_in_the_background_has_no_caller_s_context(
    database: Database, start_backend: BackendFactory
) -> None:
    """Nor keeps it alive: notifications, pruning and listening go on after the call."""
    seen: dict[str, set[str | None]] = defaultdict(set)
    engine = make_engine(database.dsn)

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        for part in ("pg_notify", "WITH gone"):
            if part in statement:
                seen[part].add(REQUEST.get(None))

    def listen_dsn() -> str:
        seen["LISTEN"].add(REQUEST.get(None))
        return database.direct_dsn

    backend: Backend = await start_backend(
        engine=engine, listen_dsn=listen_dsn, prune_interval=0.01, result_ttl=3600
    )
    seen.clear()

    async def handle() -> None:
        REQUEST.set("of a caller")
        await asyncio.gather(*[backend.set_result(f"task {i}", result_of(i)) for i in range(5)])
        await backend.wait_result("task 0")

    await asyncio.create_task(handle())
    expected = {"pg_notify", "WITH gone", "LISTEN"}

    async def have_run() -> bool:
        return seen.keys() >= expected

    await eventually(have_run)
    assert dict(seen) == {part: {None} for part in expected}
    await backend.shutdown()
    await engine.dispose()


# Eager tasks came with it.
if sys.version_info >= (3, 12):

    async def test_eager_tasks_share_statements(start_backend: BackendFactory) -> None:
        backend: Backend = await start_backend()
        factory: Any = asyncio.eager_task_factory  # type: ignore[attr-defined,unused-ignore]
        asyncio.get_running_loop().set_task_factory(factory)

        async def store(numbers: Iterable[int]) -> None:
            await asyncio.gather(*[backend.set_result(f"task {i}", result_of(i)) for i in numbers])

        async with asyncio.timeout(20):
            await store(range(50))
            found = await asyncio.gather(*[backend.get_result(f"task {i}") for i in range(50)])
        assert [result.return_value for result in found] == [*range(50)]
        assert backend.stats().operations["set_result"].batches < 25
