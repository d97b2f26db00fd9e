"""The dashboard as people use it, under its own strict policy."""

import asyncio
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
from playwright.async_api import Browser, Page, Route, expect
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress

from scripts.screenshots import pages_of
from taskiq_sa_pg import TaskStatus
from tests.browser.conftest import Shop
from tests.tasks import new_id

pytestmark = pytest.mark.asyncio(loop_scope="module")

WIDTHS = {"telephone": 360, "desk": 1280, "wall": 3840}

# Counts how often an element was added or taken away, other than by the tests.
OBSERVE = """
    window.moved = 0;
    new MutationObserver(records => {
        for (const { addedNodes, removedNodes } of records)
            window.moved += addedNodes.length + removedNodes.length;
    }).observe(document.getElementById("live"), { subtree: true, childList: true });
"""


async def start_task(shop: Shop, done: int = 1) -> str:
    task_id = new_id()
    now = datetime.now(UTC)
    status = TaskStatus(task_id, "started", "shop.images:rotate", 0, now, now, "worker-1")
    await shop[0].set_status(status)
    await set_progress(shop, task_id, done)
    return task_id


async def set_progress(shop: Shop, task_id: str, done: int) -> None:
    await shop[0].set_progress(
        task_id, TaskProgress(state="rotating", meta={"done": done, "total": 8})
    )


async def test_three_clicks_from_the_overview_to_the_failed_task_of_a_user(
    page: Page, shop: Shop
) -> None:
    failed = await shop[0].find(outcome="failed", name="shop.orders:charge_card", window=3600)
    user = failed.records[0].labels["user"]
    # Not on the text of the link: all of the figure's tile leads there.
    await page.locator(".tile.bad b").click(force=True)
    await expect(page.get_by_role("heading", level=1)).to_have_text("Failed tasks")
    await page.get_by_label("Label").click()
    await page.keyboard.type(f"user={user}")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("link", name="Clear")).to_be_visible()
    assert "worker" not in page.url  # empty fields are not sent
    await page.locator("tbody a", has_text="charge_card").first.click()
    await expect(page.get_by_label("Traceback")).to_contain_text("CardDeclinedError")
    await expect(page.get_by_text("cents", exact=True)).to_be_visible()


async def test_paging_and_back(page: Page) -> None:
    await page.get_by_role("link", name="Tasks", exact=True).click()
    first = await page.locator("tbody .mono").first.inner_text()
    await page.get_by_role("link", name="Older").click()
    await expect(page.locator("tbody .mono").first).not_to_have_text(first)
    await page.get_by_role("link", name="Older").click()
    await page.get_by_role("link", name="Newest").click()
    await expect(page.get_by_role("link", name="Newest")).to_have_count(0)


async def test_windows_and_times_in_ones_own_zone(page: Page) -> None:
    await page.get_by_role("link", name="24 h").click()
    await expect(page.get_by_role("link", name="24 h")).to_have_attribute("aria-current", "true")
    await expect(page.get_by_text("in the last 24 hours").first).to_be_visible()
    await page.get_by_role("link", name="Tasks", exact=True).click()
    title = await page.locator("time").first.get_attribute("title")
    assert title is not None
    assert "UTC" in title
    assert "your time" in title


async def test_progress_is_followed_until_the_result(page: Page, shop: Shop, address: str) -> None:
    task_id = await start_task(shop)
    async with page.expect_request("**/follow?*"):
        await page.goto(f"{address}task?id={task_id}")
    for done in (3, 6):
        await set_progress(shop, task_id, done)
        await expect(page.locator("progress")).to_have_attribute("value", str(125 * done))
    result: TaskiqResult[Any] = TaskiqResult(
        is_err=False, return_value="rotated", execution_time=1.0
    )
    await shop[0].set_result(task_id, result)
    await expect(page.locator(".state")).to_have_text("succeeded")
    await expect(page.get_by_text("rotated", exact=True)).to_be_visible()


async def test_the_overview_follows_and_nothing_jumps(page: Page, shop: Shop) -> None:
    task_id = await start_task(shop, 2)
    bar = page.get_by_label("Progress of shop.images:rotate")
    await expect(bar).to_have_attribute("value", "250", timeout=15_000)
    await page.evaluate(OBSERVE)
    await page.evaluate("scrollTo(0, 300)")
    await set_progress(shop, task_id, 5)
    await expect(bar).to_have_attribute("value", "625", timeout=15_000)
    assert await page.evaluate("scrollY") == await page.evaluate(
        "Math.min(300, document.documentElement.scrollHeight - innerHeight)"
    )
    # A refresh changes what has changed; it does not build the page anew.
    assert await page.evaluate("window.moved") < 40
    await shop[0].forget([task_id])


ANSWERS = {
    "away": (503, "away", "does not answer"),
    "refused": (403, "no", "no longer logged in"),
    "a login form": (200, "<form>Who are you?</form>", "no longer logged in"),
}


@pytest.mark.parametrize(("status", "body", "words"), ANSWERS.values(), ids=ANSWERS)
async def test_what_is_shown_stays_when_it_cannot_be_refreshed(
    page: Page, status: int, body: str, words: str
) -> None:
    refresh = "document.getElementById('live').dispatchEvent(new Event('refresh'))"
    await page.route("**/*window=1h*", lambda route: route.fulfill(status=status, body=body))
    await page.evaluate(refresh)
    await expect(page.get_by_role("status")).to_contain_text(words)
    await expect(page.locator(".chart").first).to_be_visible()
    await page.unroute("**/*window=1h*")
    await page.evaluate(refresh)
    await expect(page.locator(".offline")).to_have_count(0)


async def test_a_hidden_page_asks_for_nothing(page: Page) -> None:
    await page.evaluate(
        "Object.defineProperty(document, 'hidden', { get: () => true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.wait_for_timeout(6_000)  # the overview refreshes every 5 seconds
    assert [url for url in asked if "/static/" not in url] == []  # a browser's icon comes late


async def test_to_forget_and_to_run_again_ask_first(page: Page, shop: Shop, address: str) -> None:
    backend = shop[0]
    [record] = (await backend.find(name="shop.orders:pack", limit=1)).records
    await page.goto(f"{address}task?id={record.task_id}")
    await page.get_by_role("link", name="Run again…").click()
    await page.get_by_role("link", name="Cancel").click()
    await page.get_by_role("link", name="Run again…").click()
    await page.get_by_role("button", name="Run it again").click()
    await expect(page.locator(".state")).to_have_text("queued")
    assert record.task_id not in page.url
    await page.goto(f"{address}task?id={record.task_id}")
    await page.get_by_role("link", name="Forget…").click()
    await page.get_by_role("button", name="Forget it").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Forgotten")
    assert not await backend.is_result_ready(record.task_id)


async def test_a_second_click_does_nothing_twice(page: Page, shop: Shop, address: str) -> None:
    [record] = (await shop[0].find(name="shop.orders:pack", limit=1)).records
    posted: list[str] = []
    is_posted, may_answer = asyncio.Event(), asyncio.Event()

    async def answer_late(route: Route) -> None:
        posted.append(route.request.method)
        is_posted.set()
        await may_answer.wait()
        await route.continue_()

    await page.goto(f"{address}rerun?id={record.task_id}")
    await page.route("**/rerun?*", answer_late)
    box = await page.get_by_role("button", name="Run it again").bounding_box()
    assert box is not None
    await page.mouse.click(box["x"] + 9, box["y"] + 9)
    await is_posted.wait()
    await page.mouse.click(box["x"] + 9, box["y"] + 9)
    await page.mouse.click(0, 0)  # so those before have been seen to
    may_answer.set()
    await expect(page.locator(".state")).to_have_text("queued")
    assert posted == ["POST"]
    # Whoever goes back can do it again.
    await page.unroute("**/rerun?*")
    await page.go_back()
    await page.get_by_role("button", name="Run it again").click()
    await expect(page.locator(".state")).to_have_text("queued")


async def test_a_stream_that_was_refused_is_opened_again(
    page: Page, shop: Shop, address: str
) -> None:
    task_id = await start_task(shop)
    await page.route("**/follow?*", lambda route: route.fulfill(status=503, body="away"))
    async with page.expect_response("**/follow?*"):
        await page.goto(f"{address}task?id={task_id}")
    await page.unroute("**/follow?*")
    async with page.expect_response("**/follow?*", timeout=10_000) as again:
        pass  # with the next refresh
    assert (await again.value).status == 200
    await shop[0].forget([task_id])


async def test_no_row_moves_away_from_under_the_pointer(page: Page, address: str) -> None:
    await page.goto(f"{address}tasks")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.locator("tbody a").first.hover()
    await page.wait_for_timeout(6_500)  # the list refreshes every 5 seconds
    assert [url for url in asked if "/static/" not in url] == []  # a browser's icon comes late
    async with page.expect_request("**/tasks?*"):
        await page.mouse.move(0, 0)


async def test_everything_works_without_javascript(
    browser: Browser, shop: Shop, address: str
) -> None:
    context = await browser.new_context(java_script_enabled=False)
    page = await context.new_page()
    await page.goto(address)
    await page.get_by_role("link", name="see them").click()
    await page.get_by_label("Task name").fill("shop.orders:charge_card")
    await page.get_by_label("Finished").select_option("last 7 days")
    await page.get_by_role("button", name="Filter").click()
    await page.get_by_role("link", name="Older").click()
    await page.locator("tbody a").first.click()
    await expect(page.get_by_label("Traceback")).to_contain_text("CardDeclinedError")
    await page.get_by_role("link", name="Run again…").click()
    await page.get_by_role("button", name="Run it again").click()
    await expect(page.locator(".state")).to_have_text("queued")
    await page.goto(f"{address}parked")
    await page.get_by_text("Release", exact=True).first.click()
    await page.get_by_role("link", name="Cancel").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Parked tasks")
    await context.close()


async def test_readers_are_offered_no_change(page: Page, shop: Shop, address: str) -> None:
    await page.context.add_cookies([{"name": "may", "value": "read", "url": address}])
    for path in (await pages_of(shop[0])).values():
        if not path.startswith("forget"):
            await page.goto(f"{address}{path}")
            await expect(page.get_by_text("read only")).to_be_visible()
            await expect(page.get_by_role("link", name="Forget")).to_have_count(0)
            await expect(page.get_by_role("link", name="Discard")).to_have_count(0)


async def test_the_keyboard_is_enough(page: Page) -> None:
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("main")).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="1 h")).to_be_focused()


async def test_nothing_sticks_out_of_its_card(page: Page, shop: Shop) -> None:
    address = page.url
    for width in (360, 780, 820, 1_000):
        await page.set_viewport_size({"width": width, "height": 800})
        for name, path in (await pages_of(shop[0])).items():
            await page.goto(f"{address}{path}")
            # The longest that stands between two times: of a lost task.
            await page.evaluate(
                "document.querySelectorAll('.timeline li:nth-last-child(2) .span').forEach("
                "span => { span.textContent = 'its worker stopped responding 23 h 59 min' })"
            )
            too_wide = await page.evaluate(
                "[...document.querySelectorAll('.card:not(.table)')]"
                ".filter(card => card.scrollWidth > card.clientWidth).map(card => card.outerHTML)"
            )
            assert too_wide == [], (name, width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
async def test_every_page_is_for_everybody(  # noqa: PLR0917 - each is a fixture
    browser: Browser,
    shop: Shop,
    address: str,
    axe: str,
    scheme: Literal["light", "dark"],
    width: int,
) -> None:
    context = await browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page = await context.new_page()
    pages = await pages_of(shop[0]) | {"unknown": "task?id=nobody", "empty": "tasks?name=none"}
    for name, path in pages.items():
        await page.goto(f"{address}{path}")
        too_wide = await page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert too_wide <= 0, name
        await page.evaluate(axe)
        found = await page.evaluate("axe.run()")
        faults = [f"{each['id']}: {each['nodes'][0]['html']}" for each in found["violations"]]
        assert faults == [], name
    background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(14, 17, 23)") == (scheme == "dark")
    await context.close()
