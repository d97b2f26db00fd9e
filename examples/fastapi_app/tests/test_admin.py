"""The shop's dashboard, with the requests of an administrator's browser; no worker runs."""

import importlib
import re
from collections.abc import AsyncIterator
from types import ModuleType

import httpx
import pytest
import pytest_asyncio
from taskiq import TaskiqResult

from examples.fastapi_app.conftest import (
    ADMIN_PASSWORD,
    alembic,
    empty_database,
    place_order,
    project,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(server_dsn: str) -> AsyncIterator[ModuleType]:
    """The module `shop.app`, started on a new database."""
    async with empty_database(server_dsn) as dsn:
        await alembic(dsn, "upgrade", "head")
        with project(dsn):
            shop = importlib.import_module("shop.app")
            async with shop.lifespan(shop.app):
                yield shop


@pytest_asyncio.fixture(loop_scope="module")
async def client(shop: ModuleType) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a password."""
    transport = httpx.ASGITransport(shop.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield client


@pytest.fixture
def admin(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """The same client, with the password and the headers of the shop's pages."""
    client.auth = httpx.BasicAuth("admin", ADMIN_PASSWORD)
    client.headers["Origin"] = "http://shop"
    return client


@pytest.mark.parametrize("auth", [None, ("admin", ""), ("admin", "wrong"), ("ada", ADMIN_PASSWORD)])
async def test_without_the_password_a_browser_asks_for_it(
    client: httpx.AsyncClient, auth: tuple[str, str] | None
) -> None:
    for path in ("/admin/", "/admin/tasks", "/admin/queues"):
        response = await client.get(path, auth=auth)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"].startswith("Basic ")


async def test_without_a_password_of_the_server_nobody_may_look(
    admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shop.admin.PASSWORD", "")
    for password in ("", ADMIN_PASSWORD):
        response = await admin.get("/admin/", auth=("admin", password))
        assert response.status_code == 403
        assert "ADMIN_PASSWORD" in response.text


async def test_the_shops_page_leads_to_the_dashboard(admin: httpx.AsyncClient) -> None:
    assert 'href="/admin/"' in (await admin.get("/")).text
    response = await admin.get("/admin/")
    assert response.status_code == 200
    assert "Shop tasks" in response.text


async def test_an_order_that_no_worker_has_packed_waits_in_the_queue(
    admin: httpx.AsyncClient,
) -> None:
    before = await waiting(admin)
    await place_order(admin, 2)
    assert await waiting(admin) == before + 1
    assert "pack" in (await admin.get("/admin/queues")).text


async def waiting(admin: httpx.AsyncClient) -> int:
    page = (await admin.get("/admin/queues")).text
    shown = re.search(r"<dt>Waiting</dt><dd><b[^>]*>(\d+)</b>", page)
    return int(shown[1]) if shown else 0


async def test_a_failed_order_shows_its_error_and_can_be_forgotten(
    admin: httpx.AsyncClient, shop: ModuleType
) -> None:
    task = await place_order(admin, 11)
    task_id = task.removeprefix("/tasks/")
    error = LookupError("only 10 in stock")
    await shop.backend.set_result(
        task_id, TaskiqResult(is_err=True, return_value=None, execution_time=0.1, error=error)
    )
    assert task_id in (await admin.get("/admin/tasks?outcome=failed")).text
    page = (await admin.get(f"/admin/task?id={task_id}")).text
    assert "only 10 in stock" in page
    assert "Forget" in page
    elsewhere = {"Origin": "http://elsewhere"}
    refused = await admin.post("/admin/forget", params={"id": task_id}, headers=elsewhere)
    assert refused.status_code == 403
    forgotten = await admin.post("/admin/forget", params={"id": task_id})
    assert forgotten.status_code == 200
    assert task_id not in (await admin.get("/admin/tasks?outcome=failed")).text
