"""The processes that execute tasks."""

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response

from taskiq_sa_pg.ui.site import Page, Site


def pages(_: Site) -> list[Page]:
    """The list of workers."""
    return [Page("workers", workers, nav="Workers")]


async def workers(site: Site, request: Request) -> Response:
    """The workers that are alive, and those that stopped sending heartbeats."""
    known = await site.backend.get_workers()
    context = {
        "workers": sorted(known, key=lambda worker: (worker.is_alive, worker.worker)),
        "lost": [worker for worker in known if not worker.is_alive],
        "is_tracked": site.backend.track is not None,
        "now": datetime.now(UTC),
    }
    return site.render(request, "workers.html", context)
