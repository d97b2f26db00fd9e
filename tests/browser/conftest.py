"""A dashboard of the shop that never was, in a headless Chromium."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount

from examples.fastapi_app.conftest import empty_database
from scripts.dashboard_demo import Backend, filled
from scripts.screenshots import find_chromium, served
from taskiq_sa_pg import SQLAlchemyBroker
from taskiq_sa_pg.ui import dashboard

AXE = Path(os.environ.get("TASKIQ_SA_PG_AXE") or "build/axe.min.js")

Shop = tuple[Backend, SQLAlchemyBroker]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(server_dsn: str) -> AsyncIterator[Shop]:
    """A backend and a broker with the shop's tasks."""
    async with empty_database(server_dsn) as dsn, filled(dsn) as shop:
        yield shop


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(shop: Shop) -> AsyncIterator[str]:
    """Where the dashboard is served below a prefix; the cookie `may` says what a user may do."""

    def permission_of(request: Request) -> Any:
        return request.cookies.get("may", "write")

    backend, broker = shop
    app = dashboard(backend, authorize=permission_of, broker=broker, title="Shop tasks")
    async with served(Starlette(routes=[Mount("/admin/tasks", app)])) as address:
        yield f"{address}/admin/tasks/"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, address: str) -> AsyncIterator[Page]:
    """The overview; nothing may complain on the browser's console, the policy least of all."""
    complaints: list[str] = []
    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    page = await context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    await page.goto(address)
    yield page
    await context.close()
    # Chromium's own words for a response that a test has asked for.
    assert [each for each in complaints if "Failed to load resource" not in each] == []


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    if not AXE.is_file():
        pytest.fail(f"no {AXE}: make {AXE}, or set TASKIQ_SA_PG_AXE to the path of axe.min.js")
    return AXE.read_text("utf-8")
