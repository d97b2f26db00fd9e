"""Who may look, and who may change something."""

import asyncio
import logging
import mimetypes
from itertools import product
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from litestar.exceptions import NotAuthorizedException
from starlette.requests import Request

from taskiq_sa_pg import ConfigurationError, SQLAlchemyResultBackend
from taskiq_sa_pg.ui import dashboard, static
from tests.ui.conftest import ORIGIN, OWN, Backend, client_of, store
from tests.ui.html import Document

PATHS = ["", "tasks", "task?id=1", "workers", "follow?id=1", "forget?id=1", "nowhere", "a/b"]
OPEN = ["healthz", "static/style.css"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'"
)


@pytest.fixture
def idle() -> Backend:
    """A backend that nobody starts: who is refused needs no database."""
    return SQLAlchemyResultBackend("postgresql://nobody@nowhere/nothing")


async def answer_of(backend: Backend, authorize: Any, path: str = "", **request: Any) -> Any:
    async with client_of(dashboard(backend, authorize=authorize)) as client:
        method = request.pop("method", "GET")
        return await client.request(method, path, **request)


@pytest.mark.parametrize("path", [*PATHS, *OPEN])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
async def test_without_authorize_nobody_gets_anything(
    idle: Backend, path: str, method: str
) -> None:
    answer = await answer_of(idle, None, path, method=method, headers=OWN)
    assert answer.status_code == 403
    if method == "GET":
        assert "authorize=" in answer.text
        assert Document(answer.text).links("tasks") == []


@pytest.mark.parametrize("path", PATHS)
async def test_none_gets_nothing(idle: Backend, path: str) -> None:
    answer = await answer_of(idle, lambda _: "none", path)
    assert answer.status_code == 403
    assert "may not see" in answer.text


async def test_only_what_tells_nothing_is_open(backend: Backend) -> None:
    asked: list[Request] = []

    def authorize(request: Request) -> Any:
        asked.append(request)
        return "none"

    for path in OPEN:
        answer = await answer_of(backend, authorize, path)
        assert answer.status_code == 200
    assert (await answer_of(backend, authorize, "static/../tasks")).status_code == 403
    assert (await answer_of(backend, authorize, "static/x", method="POST")).status_code == 403
    assert (await answer_of(backend, authorize, "healthz/x")).status_code == 403
    assert len(asked) == 3


async def test_authorize_sees_the_request_and_may_be_async(backend: Backend) -> None:
    async def authorize(request: Request) -> Any:
        return "read" if request.headers.get("X-User") == "ada" else "none"

    assert (await answer_of(backend, authorize)).status_code == 403
    assert (await answer_of(backend, authorize, headers={"X-User": "ada"})).status_code == 200


@pytest.mark.parametrize("permission", [True, None, "admin", "", 1, ["read"], b"read"])
async def test_another_answer_lets_nobody_in(
    idle: Backend, permission: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await answer_of(idle, lambda _: permission)
    assert answer.status_code == 500
    assert "authorize must return" in caplog.text
    assert "Overview" not in answer.text


async def test_an_error_of_authorize_lets_nobody_in(
    idle: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    def authorize(_: Request) -> Any:
        raise LookupError("the user's secret 4711")

    answer = await answer_of(idle, authorize, "tasks")
    assert answer.status_code == 500
    assert "4711" not in answer.text
    assert "4711" in caplog.text
    assert answer.headers["Content-Security-Policy"].startswith(POLICY)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HTTPException(401, "who are you?", {"WWW-Authenticate": "Basic"}), 401),
        (HTTPException(303, "", {"Location": "/login"}), 303),
        (HTTPException(404), 404),
        (NotAuthorizedException(detail="who are you?"), 401),
        (HTTPException(200), 500),
        (HTTPException(500), 500),
    ],
)
async def test_a_framework_may_ask_for_a_login(
    idle: Backend, error: Exception, status: int
) -> None:
    def authorize(_: Request) -> Any:
        raise error

    answer = await answer_of(idle, authorize)
    assert answer.status_code == status
    for name, value in (getattr(error, "headers", None) or {}).items():
        assert status == 500 or answer.headers[name] == value


SAME = {"Sec-Fetch-Site": "same-origin"}

REFUSED: dict[str, dict[str, str]] = {
    "nothing that says whence": {},
    "another origin": {"Origin": "http://evil.test"},
    "another port": {"Origin": f"{ORIGIN}:8080"},
    "null": {"Origin": "null"},
    "no address": {"Origin": "http://[bad"},
    "an address without a host": {"Origin": "http://"},
    "cross-site": {"Sec-Fetch-Site": "cross-site"},
    "same-site": {"Sec-Fetch-Site": "same-site", "Origin": ORIGIN},
    "typed by the user": {"Sec-Fetch-Site": "none", "Origin": ORIGIN},
    "a suffix": {"Origin": f"{ORIGIN}.evil.test"},
    "a user": {"Origin": "http://tasks.test@evil.test"},
}


async def test_a_change_has_to_come_from_an_own_page(
    backend: Backend, client: httpx.AsyncClient
) -> None:
    task_id = await store(backend)
    for case, headers in REFUSED.items():
        answer = await client.post("forget", params={"id": task_id}, headers=headers)
        assert answer.status_code == 403, case
        assert "nothing was changed" in answer.text
    assert await backend.is_result_ready(task_id)


OWN_PAGES: dict[str, dict[str, str]] = {
    "its origin": OWN,
    "its origin with the port": {"Origin": f"{ORIGIN}:80"},
    "behind a proxy that changes the host": SAME | {"Origin": "https://public.test"},
    "what the browser says": SAME,
}


async def test_a_change_from_an_own_page_is_made(
    backend: Backend, client: httpx.AsyncClient
) -> None:
    for case, headers in OWN_PAGES.items():
        task_id = await store(backend)
        answer = await client.post("forget", params={"id": task_id}, headers=headers)
        assert answer.status_code == 200, case
        assert not await backend.is_result_ready(task_id)


async def test_to_read_is_not_to_write(backend: Backend, reader: httpx.AsyncClient) -> None:
    task_id = await store(backend)
    for method in ("GET", "POST"):
        answer = await reader.request(method, "forget", params={"id": task_id}, headers=OWN | SAME)
        assert answer.status_code == 403
        assert "not change anything" in answer.text
    # Whatever the page: nobody has to remember it there.
    assert (await reader.post("tasks", headers=OWN)).status_code == 403
    assert await backend.is_result_ready(task_id)
    page = await reader.get("task", params={"id": task_id})
    assert Document(page.text).links("forget") == []
    assert "read only" in page.text


async def test_a_get_changes_nothing(backend: Backend, client: httpx.AsyncClient) -> None:
    task_id = await store(backend)
    for method in ("GET", "HEAD"):
        answer = await client.request(method, "forget", params={"id": task_id})
        assert answer.status_code == 200
    assert await backend.is_result_ready(task_id)


async def test_every_response_has_the_headers(backend: Backend) -> None:
    done = await store(backend)
    paths = [path.replace("id=1", f"id={done}") for path in PATHS]
    for path, permission, method in product(
        [*paths, *OPEN, "forget?id=", "task?id=%00"], ["none", "read", "write"], ["GET", "PUT"]
    ):
        answer = await answer_of(
            backend,
            lambda _, permission=permission: permission,
            path,
            method=method,
            headers=OWN,
        )
        assert answer.headers["Content-Security-Policy"].startswith(POLICY), path
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        is_file = path.startswith("static") and answer.status_code == 200
        assert answer.headers["Cache-Control"] == ("no-cache" if is_file else "no-store")


async def test_a_websocket_is_refused(backend: Backend) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    app = dashboard(backend, authorize=lambda _: "write")
    await app({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    "arguments",
    [
        {"authorize": "read"},
        {"broker": object()},
        {"show_values": "yes"},
        {"title": ""},
        {"title": None},
    ],
)
def test_wrong_arguments_are_refused(idle: Backend, arguments: dict[str, Any]) -> None:
    [name] = arguments
    with pytest.raises(ConfigurationError, match=name):
        dashboard(idle, **arguments)


def test_what_is_no_backend_is_refused() -> None:
    wrong: Any = "postgresql://host/database"
    with pytest.raises(ConfigurationError, match="backend must be"):
        dashboard(wrong)


async def test_a_backend_that_is_not_started_says_how(
    idle: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        for path in ("", "tasks", "task?id=1", "follow?id=1", "workers"):
            answer = await answer_of(idle, lambda _: "read", path)
            assert answer.status_code == 503
            assert "broker.startup()" in answer.text
    health = await answer_of(idle, lambda _: "none", "healthz")
    assert (health.status_code, health.json()) == (503, {"ok": False})
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_path_makes_no_lines_in_the_log(
    idle: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await answer_of(idle, lambda _: None, "x%0aERROR:root:somebody else was here")
    assert answer.status_code == 500
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "\n" not in record.getMessage()


async def test_who_is_not_let_in_does_not_see_the_menu(backend: Backend) -> None:
    for path in ("static/nothing.js", "static/%2e%2e"):
        answer = await answer_of(backend, lambda _: "none", path)
        assert answer.status_code == 404
        assert Document(answer.text).links("tasks") == []
    answer = await answer_of(backend, lambda _: "read", "nowhere")
    assert len(Document(answer.text).links("tasks")) == 1


async def test_any_number_of_probes_take_one_connection(backend: Backend) -> None:
    async with client_of(dashboard(backend, authorize=lambda _: "none")) as client:
        assert (await client.get("healthz")).status_code == 200
        asked = 0
        database = backend.runtime.database
        fetch = database.fetch

        async def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            return await fetch(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(database, "fetch", counted)
            answers = await asyncio.gather(*(client.get("healthz") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert asked == 1


async def test_health_says_nothing_but_that(backend: Backend) -> None:
    health = await answer_of(backend, lambda _: "none", "healthz")
    assert (health.status_code, health.json()) == (200, {"ok": True})


async def test_types_of_files_are_not_those_of_the_machine(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mimetypes, "guess_type", lambda *_: ("text/plain", None))
    static.read_assets.cache_clear()
    for name, type_ in (("ui.js", "javascript"), ("style.css", "css"), ("icon.svg", "svg")):
        assert type_ in (await client.get(f"static/{name}")).headers["Content-Type"]


async def test_files_are_kept_for_as_long_as_their_url_says(client: httpx.AsyncClient) -> None:
    page = Document((await client.get("")).text)
    files = {url for url in page.urls if "static/" in url}
    assert len(files) == 4
    for url in files:
        answer = await client.get(url)
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert (await client.get("static/nothing.js")).status_code == 404
