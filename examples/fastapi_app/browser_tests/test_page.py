"""The shop's page in a real headless Chromium."""

import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Page, async_playwright, expect

from examples.fastapi_app.conftest import execute, is_served, packing_stopped, web_process
from tests.conftest import eventually
from tests.faults.servers import free_ports

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",  # which root needs
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Each state of each order, as the page shows it: what a look now and then might miss.
RECORD = """
    window.seen = [];
    new MutationObserver(() => {
        const item = document.querySelector("#orders li");
        const bar = item?.querySelector("progress");
        if (bar) window.seen.push([item.querySelector(".state").textContent, bar.position]);
    }).observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    path = os.environ.get("TASKIQ_SA_PG_CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), ""
    )
    if not path:
        pytest.fail(
            "no Chromium: install one (apt-get install chromium), or set TASKIQ_SA_PG_CHROMIUM "
            "to its path"
        )
    return path


@pytest_asyncio.fixture(loop_scope="module")
async def page(chromium: str, client: httpx.AsyncClient) -> AsyncIterator[Page]:
    """The shop's page; the browser's console must stay empty."""
    complaints: list[str] = []
    async with new_page(chromium) as page:
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        await page.goto(str(client.base_url))
        yield page
    assert complaints == []


@asynccontextmanager
async def new_page(chromium: str) -> AsyncIterator[Page]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = await browser.new_page()
        await page.add_init_script(RECORD)
        yield page
        await browser.close()


async def order(page: Page, customer: str, quantity: int) -> None:
    await page.get_by_label("Customer").fill(customer)
    await page.get_by_label("Quantity").fill(str(quantity))
    await page.get_by_role("button", name="Order").click()


async def test_a_click_starts_a_task_whose_progress_bar_moves_until_its_result_is_there(
    page: Page,
) -> None:
    await order(page, "<b>Ada</b> & Zoë", 6)
    item = page.locator("#orders li").first
    await expect(item.locator(".state")).to_have_text("succeeded", timeout=30_000)
    await expect(item.locator(".answer")).to_contain_text("for <b>Ada</b> & Zoë”, 6 items")
    seen = await page.evaluate("window.seen")
    positions = [position for _, position in seen]
    assert positions == sorted(positions)
    assert len({position for position in positions if 0 < position < 1}) >= 2
    assert positions[-1] == 1
    assert any(re.fullmatch(r"[1-5] of 6 packed", state) for state, _ in seen)


async def test_a_failed_task_shows_its_error(page: Page) -> None:
    await order(page, "Tim", 12)
    item = page.locator("#orders li").first
    await expect(item.locator(".state")).to_have_text("failed", timeout=30_000)
    await expect(item.locator(".answer")).to_have_text(
        "OutOfStockError: 12 ordered, and only 10 in stock"
    )
    bar = item.locator("progress")
    assert 0 < await bar.evaluate("bar => bar.position") < 1


async def test_a_reload_shows_earlier_orders_the_latest_first_and_follows_those_that_run(
    page: Page, dsn: str
) -> None:
    for customer, quantity in (("Ada", 1), ("Tim", 12)):
        await order(page, customer, quantity)
    states = page.locator("#orders li .state")
    answers = page.locator("#orders li .answer")
    await expect(states.nth(0)).to_have_text("failed", timeout=30_000)
    await expect(states.nth(1)).to_have_text("succeeded", timeout=30_000)
    told = [await answers.nth(place).text_content() for place in (0, 1)]
    async with packing_stopped(dsn):
        await order(page, "Grace", 2)
        await expect(page.locator("#orders li .title").first).to_contain_text("2 for Grace")
        await page.reload()
        await expect(page.locator("#orders li strong").first).to_have_text("2 for Grace")
        assert [await states.nth(place).text_content() for place in (1, 2)] == [
            "failed",
            "succeeded",
        ]
        assert [await answers.nth(place).text_content() for place in (1, 2)] == told
    await expect(states.first).to_have_text("succeeded", timeout=30_000)


async def test_more_orders_than_a_browser_has_connections_are_all_followed(page: Page) -> None:
    for number in range(8):
        await order(page, f"Ada {number}", 1)
    states = page.locator("#orders li .state")
    for place in range(8):
        await expect(states.nth(place)).to_have_text("succeeded", timeout=30_000)


async def test_the_page_fits_a_phone(page: Page) -> None:
    await page.set_viewport_size({"width": 360, "height": 640})
    await order(page, "W" * 100, 1)
    item = page.locator("#orders li").first
    await expect(item.locator(".state")).to_have_text("succeeded", timeout=30_000)
    assert await page.evaluate("document.documentElement.scrollWidth") == 360
    for part in await page.locator("form *, #orders li:first-child *").all():
        box = await part.bounding_box()
        assert box is None or box["x"] + box["width"] <= 360


async def test_orders_are_followed_side_by_side(page: Page) -> None:
    await order(page, "Ada", 3)
    await order(page, "Grace", 2)
    states = page.locator("#orders li .state")
    for place in (0, 1):
        await expect(states.nth(place)).to_have_text("succeeded", timeout=30_000)


async def test_the_page_follows_a_task_across_a_restart_of_the_web_server(
    chromium: str, dsn: str
) -> None:
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=address) as client, new_page(chromium) as page:
        with web_process(port) as process:
            await eventually(lambda: is_served(client), 30, pause=0.1)
            await page.goto(address)
            await order(page, "Ada", 8)
            await expect(page.locator("#orders .state").first).to_contain_text("of 8 packed")
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
        with web_process(port):
            state = page.locator("#orders .state").first
            await expect(state).to_have_text("succeeded", timeout=30_000)


async def test_the_page_comes_back_to_a_task_that_the_server_could_not_look_up(
    chromium: str, dsn: str
) -> None:
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=address) as client, new_page(chromium) as page:
        with web_process(port) as process:
            await eventually(lambda: is_served(client), 30, pause=0.1)
            await page.goto(address)
            await order(page, "Ada", 3)
            state = page.locator("#orders .state").first
            await expect(state).to_contain_text("of 3 packed")
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
        await execute(dsn, "ALTER TABLE orders RENAME TO elsewhere")
        try:
            with web_process(port):
                async with page.expect_response(lambda response: response.status == 500):
                    pass
                await execute(dsn, "ALTER TABLE elsewhere RENAME TO orders")
                await expect(state).to_have_text("succeeded", timeout=30_000)
        finally:
            await execute(dsn, "ALTER TABLE IF EXISTS elsewhere RENAME TO orders")
