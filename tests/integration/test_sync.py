"""SyncResults: scripts, threads, Flask and Django wait for results without an event loop."""

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import flask
import pytest
import werkzeug.test
from django.http import HttpRequest, JsonResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from taskiq import InMemoryBroker, TaskiqMessage, TaskiqMiddleware
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.exceptions import TaskiqResultTimeoutError
from taskiq.serializers import JSONSerializer

from taskiq_sa_pg import (
    ConfigurationError,
    InvalidTaskIdError,
    NotStartedError,
    ResultIsMissingError,
    SchemaError,
    SQLAlchemyResultBackend,
)
from taskiq_sa_pg.sync import SyncResults
from tests.conftest import Database, assert_comes_to_rest
from tests.django_settings import configure_django
from tests.integration.databases import assert_disconnected
from tests.integration.shops import Shop, labelled, packing
from tests.integration.waiters import (
    Backend,
    Backends,
    models_of,
    table_of,
    until_nobody_waits,
    until_waiting,
)
from tests.processes import heed_interrupts
from tests.tasks import new_id, progress_of, result_of

SOON = 20

FORKER = Path(__file__).parent / "forker.py"


@dataclass
class Office:
    """A SyncResults of one test, and the sessions of its backend."""

    backends: Backends
    backend: Backend
    results: SyncResults[Any]

    def store(self, task_id: str, value: Any) -> None:
        self.results.call(self.backend.set_result, task_id, result_of(value))

    def until_waiting(self, waiters: int = 1) -> None:
        self.results.call(until_waiting, self.backend, waiters)


NewOffice = Callable[..., Office]


@pytest.fixture
def new_office(waiting_tables: Database) -> Iterator[NewOffice]:
    """Makes them; at the end nobody waits, and no session is left."""
    made: list[Office] = []

    def make(source: Callable[[Backend], Any] = lambda backend: backend, **kwargs: Any) -> Office:
        backends = Backends(waiting_tables)
        if waiting_tables.is_deaf:
            kwargs.setdefault("listen_dsn", backends.direct_dsn())
        kwargs = {"models": models_of(table_of(waiting_tables), "VarChar"), **kwargs}
        backend = Backend(backends.dsn(), check_schema="off", **kwargs)
        office = Office(backends, backend, SyncResults(source(backend)))
        made.append(office)
        return office

    yield make
    for office in made:
        if office.backend.is_started:
            office.results.call(until_nobody_waits, office.backend)
            office.results.call(assert_comes_to_rest, office.backend)
        office.results.close()
        asyncio.run(assert_disconnected(office.backends.database, office.backends.name))


@pytest.fixture
def office(new_office: NewOffice) -> Office:
    return new_office()


@pytest.fixture
def results(office: Office) -> SyncResults[Any]:
    return office.results


def test_results_are_read_waited_for_found_and_deleted(
    office: Office, results: SyncResults[Any]
) -> None:
    a, b, never = new_id(), new_id(), new_id()
    with pytest.raises(ResultIsMissingError, match=a):
        results.get_result(a)
    assert not results.is_result_ready(a)
    assert results.get_status(a).state == "unknown"
    office.store(a, "2026-11-30")
    office.store(b, 2)
    assert results.is_result_ready(a)
    assert results.get_result(a).return_value == "2026-11-30"
    assert results.get_result(a, return_type=date).return_value == date(2026, 11, 30)
    assert results.get_status(a).state == "succeeded"
    found = results.get_results([a, b, never])
    assert {task_id: result.return_value for task_id, result in found.items()} == {
        a: "2026-11-30",
        b: 2,
    }
    assert results.wait_result(a, timeout=SOON) == results.get_result(a)
    assert [r.return_value for r in results.wait_results([b, a], SOON)] == [2, "2026-11-30"]
    assert {task_id for task_id, _ in results.as_completed([a, b], SOON)} == {a, b}
    models = office.backend.models
    page = results.find(models.Result.task_id.in_([a, b]), outcome="succeeded", limit=1)
    assert page.next is not None
    assert len(page.records) == 1
    assert results.get_details(b, with_result=True).result == results.get_result(b)
    assert results.forget([a, b, never]) == 2
    with pytest.raises(TaskiqResultTimeoutError):
        results.wait_result(a, timeout=0.01)
    with pytest.raises(TaskiqResultTimeoutError):
        results.wait_results([a, b], timeout=0.01)
    with pytest.raises(TaskiqResultTimeoutError):
        next(results.as_completed([a, b], timeout=0.01))


def test_progress_is_read_and_watched(office: Office, results: SyncResults[Any]) -> None:
    task_id = new_id()
    assert results.get_progress(task_id) is None
    results.call(office.backend.set_progress, task_id, progress_of(0))
    seen = []
    for progress in results.watch_progress(task_id, timeout=SOON):
        assert progress == results.get_progress(task_id)
        seen.append(progress.meta)
        if progress.meta < 3:
            later: TaskProgress[Any] = progress_of(progress.meta + 1)
            results.call(office.backend.set_progress, task_id, later)
        else:
            office.store(task_id, "done")
    assert seen == [0, 1, 2, 3]


METHODS = [
    name
    for name in vars(SyncResults)
    if not name.startswith("_") and name not in {"kiq", "call", "close"}
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_arguments_of_the_asynchronous_one(name: str) -> None:
    def parameters(owner: type) -> list[tuple[str, Any, Any]]:
        signature = inspect.signature(getattr(owner, name))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(SyncResults) == parameters(SQLAlchemyResultBackend)


def test_arguments_are_refused_at_the_call(results: SyncResults[Any]) -> None:
    with pytest.raises(ConfigurationError, match="timeout must be a number"):
        results.watch_progress("a", timeout="soon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="several tasks"):
        results.as_completed("abc")
    with pytest.raises(InvalidTaskIdError):
        results.get_result("\0")
    with pytest.raises(ConfigurationError, match=r"kiq\(\) needs a broker"):
        results.kiq(None)  # type: ignore[call-overload]


ITERATE: list[Callable[[SyncResults[Any], Iterable[str]], Any]] = [
    lambda results, ids: results.get_results(ids),
    lambda results, ids: results.wait_results(ids, SOON),
    lambda results, ids: list(results.as_completed(ids, SOON)),
    lambda results, ids: results.forget(ids),
]


def test_iterables_are_read_in_the_thread_of_the_caller(
    office: Office, results: SyncResults[Any]
) -> None:
    """Where a generator may call kiq(), and Django reads a QuerySet."""
    task_id = new_id()
    office.store(task_id, 1)

    def ids() -> Iterator[str]:
        yield from results.get_results([task_id])

    for iterate in ITERATE:
        assert iterate(results, ids())
    assert not results.is_result_ready(task_id)


def test_sources_that_cannot_work_are_refused() -> None:
    for source in (InMemoryBroker(), "postgresql://", None):
        with pytest.raises(ConfigurationError, match="takes a SQLAlchemyResultBackend"):
            SyncResults(source)  # type: ignore[call-overload]


REQUEST: ContextVar[str] = ContextVar("REQUEST", default="of nobody")


class Stamp(TaskiqMiddleware):
    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        message.labels["request"] = REQUEST.get()
        return message


def test_a_task_is_sent_in_the_context_of_the_caller(new_office: NewOffice) -> None:
    broker = InMemoryBroker()
    office = new_office(broker.with_result_backend, serializer=JSONSerializer())
    broker.add_middlewares(Stamp())

    @broker.task
    async def tomorrow(day: date) -> date:
        return date.fromordinal(day.toordinal() + 1)

    REQUEST.set("of a view")
    task = office.results.kiq(tomorrow, date(2026, 11, 30))
    assert office.results.wait_result(task, SOON).return_value == date(2026, 12, 1)
    kicker = labelled(tomorrow, tenant="acme").with_task_id(new_id())
    other = office.results.kiq(kicker, day=date(2026, 12, 1))
    [first, second] = office.results.wait_results([task, other], SOON)
    assert first.labels == {"request": "of a view"}
    assert second.labels == {"request": "of a view", "tenant": "acme"}
    assert second.return_value == date(2026, 12, 2)


async def test_a_broker_in_the_database_is_started_with_its_backend(shop: Shop) -> None:
    broker = shop.broker()
    backend = Backend(shop.dsn("postgresql"), models=broker.models, check_schema="off")
    broker = broker.with_result_backend(backend)
    pack = packing(broker)

    def send() -> list[str]:
        with SyncResults(broker) as results:
            assert results.get_status("unknown").state == "unknown"
            kicker = packing(shop.broker()).kicker()  # of a broker that is not started
            sent = [results.kiq(pack, 1).task_id, results.kiq(kicker, 2).task_id]
            assert [queue.waiting for queue in results.call(broker.get_queues)] == [2]
            return sent

    sent = await asyncio.to_thread(send)
    assert await shop.queued() == sent
    assert not backend.is_started


def test_twenty_threads_share_one_thread_and_one_listening_connection(office: Office) -> None:
    results, ids = office.results, [new_id() for _ in range(20)]
    began = threading.Barrier(20)

    def wait(task_id: str) -> Any:
        began.wait(SOON)
        return results.wait_result(task_id, SOON).return_value

    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(wait, task_id) for task_id in ids]
        office.until_waiting(20)
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("taskiq_sa_pg.sync") == 1
        assert len(asyncio.run(office.backends.listening())) == 1
        for task_id in ids:
            office.store(task_id, task_id)
        assert [future.result(SOON) for future in waiting] == ids
    assert len(asyncio.run(office.backends.listening())) == 1


def test_after_a_start_that_failed_the_next_call_starts_again(database: Database) -> None:
    backend = Backend(database.dsn)
    with SyncResults(backend) as results:
        for _ in range(2):
            with pytest.raises(SchemaError):
                results.get_results(["a"])
        asyncio.run(provision(database))
        assert results.get_results(["a"]) == {}


async def provision(database: Database) -> None:
    backend = Backend(database.dsn, run_migrations=True)
    await backend.startup()
    await backend.shutdown()


def test_it_can_be_closed_and_used_again(office: Office, results: SyncResults[Any]) -> None:
    task_id = new_id()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(results.wait_result, task_id, SOON)
        office.until_waiting()
        results.close()
        with pytest.raises(NotStartedError):
            waiting.result(SOON)
    assert not office.backend.is_started
    office.store(task_id, 1)
    assert results.get_result(task_id).return_value == 1


def test_what_nobody_refers_to_any_more_is_closed(office: Office) -> None:
    backend = office.backend
    results = SyncResults(backend)
    progress = results.watch_progress(new_id(), SOON)
    assert results.get_results(["a"]) == {}
    del results
    gc.collect()
    assert backend.is_started  # for the generator
    del progress
    gc.collect()
    assert not backend.is_started


STEPS: dict[str, Callable[[SyncResults[Any], str], Any]] = {
    "wait_result": lambda results, task_id: results.wait_result(task_id),
    "wait_results": lambda results, task_id: results.wait_results([task_id]),
    "as_completed": lambda results, task_id: next(results.as_completed([task_id])),
    "watch_progress": lambda results, task_id: next(results.watch_progress(task_id)),
}


@pytest.mark.parametrize("keep_results", [True, False])
@pytest.mark.parametrize("wait", STEPS.values(), ids=STEPS)
def test_ctrl_c_ends_a_wait(
    new_office: NewOffice, wait: Callable[[SyncResults[Any], str], Any], keep_results: bool
) -> None:
    office, task_id = new_office(keep_results=keep_results), new_id()

    def interrupt() -> None:
        office.until_waiting()
        os.kill(os.getpid(), signal.SIGINT)

    office.results.get_results([])
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        wait(office.results, task_id)
    thread.join()
    office.results.call(until_nobody_waits, office.backend)
    office.store(task_id, 1)
    assert office.results.get_result(task_id).return_value == 1


def test_a_generator_that_is_left_holds_nothing(office: Office, results: SyncResults[Any]) -> None:
    task_id, other = new_id(), new_id()
    results.call(office.backend.set_progress, task_id, progress_of(0))
    office.store(other, 1)
    for _ in results.watch_progress(task_id):
        break
    assert office.backend.runtime.waiters.waiting == 0
    with closing(results.as_completed([other, task_id])) as completed:
        assert next(completed)[0] == other
        assert office.backend.runtime.waiters.waiting == 1
    assert office.backend.runtime.waiters.waiting == 0
    assert list(completed) == []


def test_a_generator_may_outlive_its_portal(office: Office, results: SyncResults[Any]) -> None:
    task_id = new_id()
    results.call(office.backend.set_progress, task_id, progress_of(0))
    watched = results.watch_progress(task_id)
    next(watched)
    results.close()
    with pytest.raises(NotStartedError):
        next(watched)
    watched.close()


ASYNCHRONOUS: dict[str, Callable[[SyncResults[Any]], Any]] = {
    **{name: lambda results, name=name: getattr(results, name)("a") for name in METHODS},
    "find": lambda results: results.find(),
    "call": lambda results: results.call(asyncio.sleep, 0),
}


async def test_no_call_blocks_an_event_loop(office: Office, results: SyncResults[Any]) -> None:
    for name, call in ASYNCHRONOUS.items():
        with pytest.raises(ConfigurationError, match=rf"SyncResults\.{name}\(\) would block") as e:
            call(results)
        assert f"backend.{name}(...)`" in str(e.value) or name == "call"
    assert not office.backend.is_started
    # A thread is the way for synchronous code in asynchronous code.
    assert await asyncio.to_thread(results.get_results, ["a"]) == {}
    await asyncio.to_thread(results.close)


async def test_a_backend_works_on_one_event_loop_at_a_time(
    office: Office, results: SyncResults[Any]
) -> None:
    backend = office.backend
    await asyncio.to_thread(results.get_results, ["a"])
    with pytest.raises(NotStartedError, match="on another event loop"):
        await backend.get_results(["a"])
    with pytest.raises(NotStartedError, match="create a broker or result backend for each"):
        await backend.startup()
    await asyncio.to_thread(results.close)
    await backend.startup()
    broker = InMemoryBroker().with_result_backend(backend)
    for other in (results, SyncResults(broker)):
        with pytest.raises(NotStartedError, match="create a broker or result backend for each"):
            await asyncio.to_thread(other.get_results, ["a"])
    assert await backend.get_results(["a"]) == {}  # nobody has ended it
    await backend.shutdown()
    assert await asyncio.to_thread(results.get_results, ["a"]) == {}
    await asyncio.to_thread(results.close)


def test_flask(office: Office, results: SyncResults[Any]) -> None:
    app = flask.Flask("shop")

    @app.get("/tasks/<task_id>")
    def show(task_id: str) -> dict[str, Any]:
        return {"value": results.wait_result(task_id, timeout=SOON).return_value}

    def get(path: str) -> Any:
        # Not Flask's own client: that of Flask 2.2 does not know Werkzeug 3.1.
        return werkzeug.test.Client(app).get(path).json

    task_id = new_id()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(get, f"/tasks/{task_id}") for _ in range(2)]
        office.until_waiting(2)
        office.store(task_id, 42)
        assert [answer.result(SOON) for answer in answers] == [{"value": 42}] * 2


def test_django(office: Office, results: SyncResults[Any]) -> None:
    """A synchronous view, by WSGI and in the thread that ASGI gives it."""

    def show(_: HttpRequest, task_id: str) -> JsonResponse:
        return JsonResponse({"value": results.wait_result(task_id, timeout=SOON).return_value})

    urls = ModuleType("urls")
    vars(urls)["urlpatterns"] = [path("tasks/<task_id>", show)]
    configure_django()
    task_id = new_id()
    office.store(task_id, 42)

    async def get() -> Any:
        return (await AsyncClient().get(f"/tasks/{task_id}")).json()

    with override_settings(ROOT_URLCONF=urls):
        assert Client().get(f"/tasks/{task_id}").json() == {"value": 42}
        assert asyncio.run(get()) == {"value": 42}


def test_a_script_that_forks_and_forgets_to_close(waiting_tables: Database) -> None:
    """The child has its own connections, Ctrl-C ends its wait, and both processes end."""
    backends = Backends(waiting_tables)
    arguments = [backends.dsn(), backends.direct_dsn(), table_of(waiting_tables)]
    script = subprocess.run(
        # Since Python 3.12 a fork of a process with threads is a warning.
        [sys.executable, "-W", "ignore::DeprecationWarning", FORKER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=heed_interrupts,
    )
    assert script.stdout == "1\n[-2, 1, 0]\n"
    # What Python itself prints of the interrupt in the child.
    assert script.stderr.count("Traceback") == 1
    assert script.stderr.endswith("KeyboardInterrupt\n")
    asyncio.run(assert_disconnected(backends.database, backends.name))
