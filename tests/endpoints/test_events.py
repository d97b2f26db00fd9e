"""GET /{task_id}/events: progress, the result, and every way in which a stream ends."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import Message, Scope

from taskiq_sa_pg import TaskStatus
from taskiq_sa_pg.endpoints import EventResponse, encode_event, keep_open
from taskiq_sa_pg.fastapi import task_router
from tests.conftest import BackendFactory, Database, assert_comes_to_rest, eventually
from tests.endpoints.served import (
    FRAMEWORKS,
    Backend,
    Event,
    client_of,
    client_to,
    events_of,
    follow,
    make_app,
    served,
    server_of,
)
from tests.tasks import new_id, progress_of, result_of


@asynccontextmanager
async def stream(client: httpx.AsyncClient, task_id: str) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a task; at the end the client goes away."""
    async with client.stream("GET", f"/tasks/{task_id}/events") as response:
        assert response.status_code == 200
        yield events_of(response)


async def until_followed(backend: Backend, streams: int) -> None:
    async def is_followed() -> bool:
        return backend.runtime.waiters.waiting == streams

    await eventually(is_followed)


async def until_at_rest(backend: Backend, tasks: set[asyncio.Task[Any]]) -> None:
    """Nobody waits, no connection is in use, and of requests and streams only these tasks run."""

    async def is_at_rest() -> bool:
        left = map(repr, asyncio.all_tasks() - tasks)
        is_left = any("taskiq_sa_pg/endpoints" in task or "run_asgi" in task for task in left)
        return not is_left and not backend.runtime.waiters.subscriptions

    await eventually(is_at_rest)
    await assert_comes_to_rest(backend)


async def started_task(backend: Backend) -> str:
    task_id = new_id()
    await backend.set_status(TaskStatus(task_id, "started"))
    return task_id


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_progress_comes_as_it_changes_and_the_result_ends_the_stream(
    backend: Backend, framework: str
) -> None:
    task_id = await started_task(backend)
    await backend.set_progress(task_id, progress_of({"done": 0}))
    async with (
        served(make_app(backend, framework)) as client,
        client.stream("GET", f"/tasks/{task_id}/events") as response,
    ):
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Accel-Buffering"] == "no"
        seen = []
        async for name, data in events_of(response):
            seen.append((name, data))
            if len(seen) < 3:
                await backend.set_progress(task_id, progress_of({"done": len(seen)}))
            elif len(seen) == 3:
                await backend.set_result(task_id, result_of("a\nb"))
        answer = (await client.get(f"/tasks/{task_id}")).json()
    *progress, last = seen
    assert progress == [
        ("progress", {"state": "running", "meta": {"done": done}}) for done in range(3)
    ]
    assert answer["value"] == "a\nb"
    assert last == ("result", answer)


async def test_a_finished_task_has_its_last_progress_and_its_result(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(7))
    await backend.set_result(task_id, result_of(1, is_err=True, error=ValueError("no")))
    async with client_of(make_app(backend)) as client:
        (name, progress), (last, answer) = await follow(client, task_id)
    assert (name, progress["meta"], last) == ("progress", 7, "result")
    assert (answer["state"], answer["error"]["message"]) == ("failed", "no")


async def test_a_browser_that_comes_back_gets_the_current_progress_and_after_the_end_nothing(
    backend: Backend,
) -> None:
    """EventSource repeats the last id that it got, and gives up at a 204."""
    task_id = await started_task(backend)
    await backend.set_progress(task_id, progress_of(1))
    async with served(make_app(backend)) as client:
        path = f"/tasks/{task_id}/events"
        for last_event_id in ("", "7", "null", "x" * 1_000):
            headers = {"Last-Event-ID": last_event_id}
            async with client.stream("GET", path, headers=headers) as response:
                assert (await anext(events_of(response)))[1]["meta"] == 1
        await backend.set_result(task_id, result_of(1))
        text = (await client.get(path)).text
        assert text.startswith("retry: ")
        ids = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("id: ")]
        assert len(ids) == 1, "progress has none: nothing can be missed"
        response = await client.get(path, headers={"Last-Event-ID": ids[0]})
        assert (response.status_code, response.content) == (204, b"")


async def test_a_stream_is_refused_as_a_task_is(
    start_backend: BackendFactory, database: Database
) -> None:
    backend = await start_backend(result_ttl=60)
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    await database.fetch("UPDATE taskiq_results SET expires_at = now() - interval '1 second'")
    async with client_of(make_app(backend)) as client:
        assert (await client.get(f"/tasks/{task_id}/events")).status_code == 410
        assert (await client.get(f"/tasks/{new_id()}/events")).status_code == 404


async def test_where_results_are_read_once_a_stream_takes_none(
    start_backend: BackendFactory,
) -> None:
    backend = await start_backend(keep_results=False)
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    async with served(make_app(backend)) as client:
        following = asyncio.create_task(follow(client, task_id))
        await until_followed(backend, 1)
        await backend.set_result(task_id, result_of("once"))
        *_, (name, answer) = await following
    assert (name, answer["value"]) == ("result", "once")
    assert (await backend.get_result(task_id)).return_value == "once"


async def test_a_result_that_is_gone_when_it_is_told_ends_the_stream(
    start_backend: BackendFactory,
) -> None:
    """Somebody else has read it, once and for all."""
    backend = await start_backend(keep_results=False)
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    async with served(make_app(backend)) as client:
        following = asyncio.create_task(follow(client, task_id))
        await until_followed(backend, 1)
        await backend.forget([task_id])
        backend.runtime.waiters.hear(backend.models.config.results_channel, f'["{task_id}"]')
        *_, last = await following
        response = await client.get(f"/tasks/{task_id}/events")
    assert last == ("gone", {"detail": "no such task"})
    assert response.status_code == 404


async def test_a_task_that_is_forgotten_ends_the_stream_though_nobody_is_told(
    backend: Backend,
) -> None:
    task_id = await started_task(backend)
    async with served(make_app(backend, heartbeat=0.01)) as client:
        following = asyncio.create_task(follow(client, task_id))
        await until_followed(backend, 1)
        await backend.forget([task_id])
        *_, last = await following
    assert last == ("gone", {"detail": "no such task"})


async def test_without_track_a_task_of_which_nothing_is_known_may_still_finish(
    start_backend: BackendFactory, database: Database
) -> None:
    backend = await start_backend()
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))
    async with (
        served(make_app(backend, heartbeat=0.01)) as client,
        stream(client, task_id) as events,
    ):
        while (await anext(events))[0] != "progress":
            pass
        await database.fetch("DELETE FROM taskiq_results_progress")
        assert [await anext(events) for _ in range(3)] == [(":", None)] * 3
        await backend.set_result(task_id, result_of(1))
        assert "result" in [name async for name, _ in events]


async def test_progress_that_cannot_be_read_back_ends_the_stream_and_after_it_the_result_comes(
    backend: Backend, tables: Database, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = await started_task(backend)
    await backend.set_progress(task_id, progress_of(1))
    await tables.fetch(
        "UPDATE taskiq_results_progress SET meta = '\\x00' WHERE task_id = $1", task_id
    )
    async with served(make_app(backend)) as client:
        assert await follow(client, task_id) == [], "the browser comes back"
        await backend.set_result(task_id, result_of(1))
        [(name, answer)] = await follow(client, task_id)
    assert (name, answer["value"]) == ("result", 1)
    assert task_id in caplog.text


async def test_silence_is_filled_with_comments(backend: Backend) -> None:
    task_id = await started_task(backend)
    async with (
        served(make_app(backend, heartbeat=0.01)) as client,
        stream(client, task_id) as events,
    ):
        assert [await anext(events) for _ in range(3)] == [(":", None)] * 3


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_clients_that_leave_leave_nothing_behind(backend: Backend, framework: str) -> None:
    tasks = asyncio.all_tasks()
    task_id = await started_task(backend)
    await backend.set_progress(task_id, progress_of(1))
    async with served(make_app(backend, framework)) as client:
        async with AsyncExitStack() as streams:
            opened = [await streams.enter_async_context(stream(client, task_id)) for _ in range(20)]
            for events in opened:
                assert (await anext(events))[0] == "progress"
            await until_followed(backend, 20)
            await assert_comes_to_rest(backend)
        await until_at_rest(backend, tasks)
        assert (await client.get(f"/tasks/{task_id}")).status_code == 202


async def test_a_client_that_leaves_is_noticed_through_starlettes_middleware(
    backend: Backend,
) -> None:
    tasks = asyncio.all_tasks()
    task_id = await started_task(backend)
    app = make_app(backend)

    async def passing(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    async with served(app) as client:
        async with stream(client, task_id):
            await until_followed(backend, 1)
        await until_at_rest(backend, tasks)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_client_that_leaves_is_noticed_whatever_the_server_tells(
    backend: Backend, spec_version: str
) -> None:
    """Servers of 2.4 may raise OSError in send(), which Starlette waits for; all tell receive()."""
    tasks = asyncio.all_tasks()
    task_id = await started_task(backend)
    path = f"/tasks/{task_id}/events"
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }
    is_leaving = asyncio.Event()
    messages: asyncio.Queue[Message] = asyncio.Queue()

    async def receive() -> Message:
        await is_leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if is_leaving.is_set():
            raise OSError("the client is gone")
        messages.put_nowait(message)

    calling = asyncio.create_task(make_app(backend)(scope, receive, send))
    await until_followed(backend, 1)
    is_leaving.set()
    async with asyncio.timeout(5):
        await calling
    await until_at_rest(backend, tasks)


async def test_a_request_that_is_cancelled_leaves_nothing_behind(backend: Backend) -> None:
    tasks = asyncio.all_tasks()
    task_id = await started_task(backend)
    async with client_of(make_app(backend)) as client:
        requesting = asyncio.create_task(client.get(f"/tasks/{task_id}/events"))
        await until_followed(backend, 1)
        requesting.cancel()
        await asyncio.wait([requesting])
        assert requesting.cancelled()
    await until_at_rest(backend, tasks)


async def test_uvicorn_stops_with_open_streams_and_their_clients_come_back(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits for them without a limit, and logs what it has to cut off."""
    tasks = asyncio.all_tasks()
    task_id = await started_task(backend)
    async with server_of(make_app(backend)) as server, client_to(server) as client:
        following = [asyncio.create_task(follow(client, task_id)) for _ in range(3)]
        await until_followed(backend, 3)
        server.should_exit = True
        async with asyncio.timeout(5):
            assert await asyncio.gather(*following) == [[], [], []]
    await until_at_rest(backend, tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_the_backends_shutdown_ends_streams(
    start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await start_backend(track="started")
    task_id = await started_task(backend)
    async with served(make_app(backend)) as client:
        following = asyncio.create_task(follow(client, task_id))
        await until_followed(backend, 1)
        await backend.shutdown()
        assert await following == []
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_while_the_database_cannot_be_asked_a_stream_is_empty_so_that_browsers_try_again(
    backend: Backend, tables: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """EventSource gives up at any status but 200."""
    task_id = await started_task(backend)
    async with served(make_app(backend)) as client:
        await tables.fetch("ALTER TABLE taskiq_results RENAME TO elsewhere")
        try:
            response = await client.get(f"/tasks/{task_id}/events")
        finally:
            await tables.fetch("ALTER TABLE elsewhere RENAME TO taskiq_results")
        assert (response.status_code, response.text) == (200, "retry: 3000\n\n")
        assert task_id in caplog.text
        await backend.set_result(task_id, result_of(1))
        assert [name for name, _ in await follow(client, task_id)] == ["result"]


async def test_a_stream_whose_database_fails_meanwhile_ends_and_this_is_logged(
    backend: Backend, tables: Database, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = await started_task(backend)
    async with served(make_app(backend)) as client:
        following = asyncio.create_task(follow(client, task_id))
        await until_followed(backend, 1)
        [subscription] = backend.runtime.waiters.subscriptions
        await tables.fetch("ALTER TABLE taskiq_results_progress RENAME TO elsewhere")
        try:  # the stream may have ended by itself, with its first query
            subscription.wake(subscription.topics)
            assert await following == []
        finally:
            await tables.fetch("ALTER TABLE elsewhere RENAME TO taskiq_results_progress")
    assert "a stream of events ended" in caplog.text


async def test_what_dependencies_do_after_the_response_is_done_after_the_stream(
    backend: Backend,
) -> None:
    done = []

    def note(background: BackgroundTasks) -> None:
        background.add_task(done.append, "after")

    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    app = FastAPI()
    app.include_router(task_router(backend, dependencies=[Depends(note)]), prefix="/tasks")
    async with client_of(app) as client:
        await follow(client, task_id)
    assert done == ["after"]


@pytest.fixture
def closed() -> list[str]:
    """Where `endless` says that it was closed."""
    return []


@pytest.fixture
def endless(closed: list[str]) -> AsyncGenerator[bytes, None]:
    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield encode_event("tick", "1")
        finally:
            closed.append("closed")

    return endless()


async def test_whoever_closes_a_stream_closes_its_events(
    endless: AsyncGenerator[bytes, None], closed: list[str]
) -> None:
    stream = keep_open(endless)
    assert [await anext(stream) for _ in range(2)] == [
        b"retry: 3000\n\n",
        b"event: tick\ndata: 1\n\n",
    ]
    await stream.aclose()
    assert closed == ["closed"]


async def test_a_response_that_is_cancelled_as_it_sends_closes_its_events(
    endless: AsyncGenerator[bytes, None], closed: list[str]
) -> None:
    is_sending = asyncio.Event()

    async def send(message: Message) -> None:
        if b"tick" in message.get("body", b""):
            is_sending.set()
            await asyncio.Event().wait()

    response = EventResponse(endless)
    sending = asyncio.create_task(response({"type": "http"}, asyncio.Event().wait, send))  # type: ignore[arg-type]  # which never returns
    await is_sending.wait()
    sending.cancel()
    await asyncio.wait([sending])
    assert sending.cancelled()
    assert closed == ["closed"]


async def test_a_server_that_raises_as_the_client_is_gone_ends_the_response(
    endless: AsyncGenerator[bytes, None], closed: list[str]
) -> None:
    async def send(message: Message) -> None:
        if b"tick" in message.get("body", b""):
            raise ConnectionResetError("the client is gone")

    async with asyncio.timeout(5):
        await EventResponse(endless)({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]  # as above
    assert closed == ["closed"]


def test_an_event_is_one_whatever_its_data() -> None:
    assert encode_event("html", "a\nb\r\nc\rd\ud800", event_id="7") == (
        b"event: html\nid: 7\ndata: a\ndata: b\ndata: c\ndata: d?\n\n"
    )
