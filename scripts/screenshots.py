"""Takes pictures of each page of the dashboard: docs/images/*.png, light and dark.

It needs a Chromium: TASKIQ_SA_PG_CHROMIUM, or `apt-get install chromium`.
"""

import argparse
import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import uvicorn
from playwright.async_api import Browser, async_playwright

from scripts.dashboard_demo import Backend, filled
from taskiq_sa_pg.embedded import postgres
from taskiq_sa_pg.ui import dashboard

IMAGES: Final = Path(__file__).parent.parent / "docs" / "images"
MAX_HEIGHT: Final = 1_050
SCHEMES: Final[tuple[Literal["light"], Literal["dark"]]] = ("light", "dark")


def find_chromium() -> str:
    """Its path; exits where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("TASKIQ_SA_PG_CHROMIUM") or next(
        filter(None, map(shutil.which, names)), None
    )
    if found is None:
        raise SystemExit("no Chromium: apt-get install chromium, or set TASKIQ_SA_PG_CHROMIUM")
    return found


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The address of an application, which uvicorn serves in this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0.05)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    yield f"http://{host}:{port}"
    server.should_exit = True
    await serving


async def pages_of(backend: Backend) -> dict[str, str]:
    """The pages to take pictures of, by the name of the picture."""
    failed = await backend.find(outcome="failed", name="shop.orders:charge_card", limit=1)
    succeeded = await backend.find(outcome="succeeded", name="shop.orders:pack", limit=1)
    running = await backend.get_running()
    return {
        "overview": "",
        "tasks": "tasks?outcome=failed&label=shop%3Dlyon",
        "task-failed": f"task?id={quote(failed.records[0].task_id)}",
        "task-succeeded": f"task?id={quote(succeeded.records[0].task_id)}",
        "task-running": f"task?id={quote(running[1].task_id)}",
        "workers": "workers",
        "queues": "queues",
        "parked": "parked",
        "schedules": "schedules",
        "forget": f"forget?id={quote(failed.records[0].task_id)}",
    }


async def take(
    browser: Browser, url: str, path: Path, scheme: Literal["light", "dark"], width: int
) -> None:
    """One picture, of the whole page."""
    page = await browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme=scheme, device_scale_factor=1
    )
    page.on("console", lambda message: print(path.name, message.type, message.text))
    page.on("pageerror", lambda error: print(path.name, error))
    await page.goto(url)
    # The whole page, but for long lists.
    height = await page.evaluate("document.documentElement.scrollHeight")
    await page.set_viewport_size({"width": width, "height": min(height, MAX_HEIGHT)})
    await page.screenshot(path=path)
    overflow = await page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    if overflow > 0:
        print(f"{path.name} is {overflow} px wider than its window of {width}")
    await page.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=IMAGES)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    chromium = find_chromium()
    arguments.to.mkdir(parents=True, exist_ok=True)
    with postgres() as server:
        async with filled(server.dsn) as (backend, broker), async_playwright() as playwright:
            app = dashboard(backend, authorize=lambda _: "write", broker=broker, title="Shop tasks")
            browser = await playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            async with served(app) as address:
                for name, path in (await pages_of(backend)).items():
                    if arguments.only and name not in arguments.only:
                        continue
                    for scheme in SCHEMES:
                        file = arguments.to / f"{name}-{scheme}.png"
                        await take(browser, f"{address}/{path}", file, scheme, arguments.width)
                        print(file)
            await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
