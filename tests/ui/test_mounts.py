"""Where a dashboard can be: in other applications, below prefixes, behind proxies."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar, asgi
from starlette.applications import Starlette
from starlette.routing import Mount

from taskiq_sa_pg.ui import dashboard
from tests.tasks import new_id, progress_of, result_of
from tests.ui.conftest import ORIGIN, OWN, Backend, client_of, store
from tests.ui.html import Document, check

# An application, and where a browser finds the dashboard in it.
Place = tuple[Any, str]


def alone(app: Any) -> Place:
    return app, "/"


def in_starlette(app: Any) -> Place:
    return Starlette(routes=[Mount("/tasks", app)]), "/tasks/"


def in_fastapi(app: Any) -> Place:
    host = FastAPI()
    host.mount("/tasks", app)
    return host, "/tasks/"


def nested(app: Any) -> Place:
    inner = FastAPI()
    inner.mount("/tasks", app)
    outer = Starlette(routes=[Mount("/a", Mount("/b", inner))])
    return outer, "/a/b/tasks/"


def in_litestar(app: Any) -> Place:
    handler = asgi("/admin/tasks", is_mount=True, copy_scope=True)(app)
    return Litestar([handler], logging_config=None), "/admin/tasks/"


def with_root_path(app: Any) -> Place:
    async def server(scope: Any, receive: Any, send: Any) -> None:
        # As uvicorn does with --root-path.
        await in_fastapi(app)[0]({**scope, "root_path": "/api"}, receive, send)

    return server, "/api/tasks/"


def with_a_slash_after_the_root_path(app: Any) -> Place:
    async def server(scope: Any, receive: Any, send: Any) -> None:
        # As uvicorn does with --root-path=/api/, behind a proxy that strips it.
        path = scope["path"].removeprefix("/api")
        await app({**scope, "root_path": "/api/", "path": f"/api/{path}"}, receive, send)

    return server, "/api/"


def behind_a_proxy(app: Any) -> Place:
    return stripped(in_fastapi(app)[0], "/api/v1"), "/api/v1/tasks/"


def behind_a_proxy_in_litestar(app: Any) -> Place:
    return stripped(in_litestar(app)[0], "/api"), "/api/admin/tasks/"


def behind_a_proxy_alone(app: Any) -> Place:
    return stripped(app, "/tasks"), "/tasks/"


def without_raw_path(app: Any) -> Place:
    async def server(scope: Any, receive: Any, send: Any) -> None:
        await in_starlette(app)[0]({k: scope[k] for k in scope if k != "raw_path"}, receive, send)

    return server, "/tasks/"


def stripped(app: Any, prefix: str) -> Any:
    """A proxy that serves an application below a prefix, of which that hears nothing."""

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"].startswith(prefix)
        path = scope["path"].removeprefix(prefix)
        raw_path = scope["raw_path"].removeprefix(prefix.encode())
        await app({**scope, "path": path, "raw_path": raw_path}, receive, send)

    return proxy


PLACES: list[Callable[[Any], Place]] = [
    alone,
    in_starlette,
    in_fastapi,
    nested,
    in_litestar,
    with_root_path,
    with_a_slash_after_the_root_path,
    behind_a_proxy,
    behind_a_proxy_in_litestar,
    behind_a_proxy_alone,
    without_raw_path,
]


@pytest.mark.parametrize("place", PLACES)
async def test_every_url_leads_on(backend: Backend, place: Callable[[Any], Place]) -> None:
    task_id = await store(backend, 1)
    await store(backend, error=ValueError())
    app, root = place(dashboard(backend, authorize=lambda _: "write"))
    async with client_of(app, f"{ORIGIN}{root}") as client:
        seen, waiting = set(), [f"{ORIGIN}{root}"]
        while waiting:
            url = waiting.pop()
            path = urlsplit(url).path
            if path in seen:
                continue
            seen.add(path)
            answer = await client.get(url)
            assert answer.status_code == 200, url
            if "html" in answer.headers["Content-Type"]:
                waiting += [urljoin(url, each) for each in check(answer.text, url, root).urls]
        pages = {path.removeprefix(root) for path in seen}
        assert {"", "tasks", "task", "workers", "forget", "static/style.css"} <= pages
        deep = await client.get("no/such/page")
        assert deep.status_code == 404
        [brand] = [
            a for _, a in check(deep.text, str(deep.url), root).elements if "brand" in a.values()
        ]
        assert urljoin(str(deep.url), brand["href"]) == f"{ORIGIN}{root}"
        answer = await client.post("forget", params={"id": task_id}, headers=OWN)
        assert answer.status_code == 200
        assert not await backend.is_result_ready(task_id)


@pytest.mark.parametrize("place", [in_litestar, behind_a_proxy_in_litestar])
async def test_a_missing_slash_is_added_by_a_relative_redirect(
    backend: Backend, place: Callable[[Any], Place]
) -> None:
    app, root = place(dashboard(backend, authorize=lambda _: "read"))
    async with client_of(app) as client:
        answer = await client.get(f"{root.rstrip('/')}?window=6h")
        assert answer.status_code == 307
        assert answer.headers["Location"] == "./tasks/?window=6h"
        answer = await client.get(urljoin(str(answer.url), answer.headers["Location"]))
        assert "in the last 6 hours" in answer.text


async def test_a_slash_too_many_is_taken_away(backend: Backend) -> None:
    for place in PLACES:
        app, root = place(dashboard(backend, authorize=lambda _: "read"))
        async with client_of(app) as client:
            answer = await client.get(f"{root}tasks/?outcome=failed")
            assert answer.headers["Location"] == "../tasks?outcome=failed", place
            answer = await client.get(urljoin(str(answer.url), answer.headers["Location"]))
            assert answer.status_code == 200, place


async def test_no_redirect_leads_elsewhere(backend: Backend) -> None:
    app = dashboard(backend, authorize=lambda _: "read")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    for raw_path in (b"//evil.test", b"/evil.test:80", b"//evil.test/%0d%0aX: y", b"/\\evil.test"):
        scope = {"type": "http", "method": "GET", "path": "/", "raw_path": raw_path}
        await app(scope | {"headers": [], "query_string": b""}, receive, send)
    for message in sent[::2]:
        location = dict(message["headers"])[b"location"].decode()
        assert location.startswith("./")
        assert urlsplit(urljoin(f"{ORIGIN}/a/b", location)).netloc == urlsplit(ORIGIN).netloc


async def test_progress_is_told_until_the_result_is_there(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    task_id = new_id()
    await backend.set_progress(task_id, progress_of(1))

    async def follow() -> str:
        return (await reader.get("follow", params={"id": task_id})).text

    following = asyncio.create_task(follow())
    while not backend.runtime.waiters.waiting:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)
    await backend.set_result(task_id, result_of(1))
    events = [line for line in (await following).splitlines() if line.startswith("event")]
    assert events == ["event: refresh", "event: end"]


async def test_only_the_head_of_a_stream_is_no_stream(reader: httpx.AsyncClient) -> None:
    answer = await reader.head("follow", params={"id": new_id()})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")


async def test_a_stream_ends_with_its_client(backend: Backend) -> None:
    app = dashboard(backend, authorize=lambda _: "read")
    is_left = asyncio.Event()
    started = asyncio.Event()

    async def receive() -> Any:
        await is_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            started.set()

    scope = {"type": "http", "method": "GET", "path": "/follow", "raw_path": b"/follow"}
    serving = asyncio.create_task(
        app(scope | {"headers": [], "query_string": b"id=1"}, receive, send)
    )
    await started.wait()
    assert not serving.done()
    is_left.set()
    await serving
    assert backend.runtime.waiters.waiting == 0


async def test_a_stream_ends_with_the_backend(backend: Backend, reader: httpx.AsyncClient) -> None:
    following = asyncio.create_task(reader.get("follow", params={"id": new_id()}))
    while not backend.runtime.waiters.waiting:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)
    await backend.shutdown()
    assert (await following).status_code == 200


@pytest.mark.parametrize("missing", ["jinja2", "starlette"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("taskiq_sa_pg.ui")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'taskiq-sa-pg\[ui\]'"):
        import taskiq_sa_pg.ui  # noqa: F401


async def test_the_frame_is_for_everybody(reader: httpx.AsyncClient) -> None:
    for path, current in (("", "Overview"), ("tasks", "Tasks"), ("workers", "Workers")):
        page = Document((await reader.get(path)).text)
        tags = [tag for tag, _ in page.elements]
        assert tags.count("main") == tags.count("h1") == 1
        assert "header" in tags
        [here] = [a for _, a in page.elements if a.get("aria-current") == "page"]
        assert here["href"] == f"./{path}"
        assert ("html", {"lang": "en"}) in page.elements
        first = next(a for tag, a in page.elements if tag == "a")
        assert first == {"class": "skip", "href": "#main"}
        assert current in page.text
