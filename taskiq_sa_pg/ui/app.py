"""dashboard(): the application to mount, and how it routes requests to pages."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from taskiq.abc.broker import AsyncBroker

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    InvalidTaskIdError,
    NotStartedError,
    ResultIsMissingError,
    StorageError,
    check_flag,
)
from taskiq_sa_pg.ui import changes, detail, overview, queues, tasks, workers
from taskiq_sa_pg.ui.health import Health
from taskiq_sa_pg.ui.security import (
    Authorize,
    Guard,
    check_authorize,
    is_let_in,
    may_write,
    route_path,
)
from taskiq_sa_pg.ui.site import Page, Site
from taskiq_sa_pg.ui.static import asset

# Each lists its pages for a site, in the order of the navigation.
_MODULES = (overview, tasks, workers, queues, detail, changes)

_NOT_STARTED = (
    "The result backend of this dashboard is not started in this process, or it is started on "
    "another event loop.",
    "Call `await broker.startup()`, or `await backend.startup()`, when your application starts: "
    "in its lifespan.",
)

# Longer than find() allows for a statement, and much shorter than the backend's retry_timeout.
SECONDS: Final = 15

# Pages share the application's connections, five by default. This limit leaves some for its tasks,
# even if users start many slow searches.
_MOST_AT_ONCE: Final = 3

_QUERY_CANCELED: Final = "57014"

_TOO_LONG: Final = "Use a narrower filter, or a shorter time window."

# The first matching class gives the status, the heading, and a text instead of the error's own.
_EXCUSES: Final[Mapping[type[Exception], tuple[int, str, tuple[str, ...]]]] = {
    TimeoutError: (
        503,
        "PostgreSQL does not answer",
        ("It did not answer in time. Try again in a minute.",),
    ),
    NotStartedError: (503, "The backend is not started", _NOT_STARTED),
    StorageError: (503, "PostgreSQL does not answer", ()),
    InvalidTaskIdError: (404, "No such task", ()),
    ResultIsMissingError: (404, "No such task", ()),
    ConfigurationError: (400, "Invalid request", ()),
    RecursionError: (
        500,
        "This cannot be shown",
        ("Its arguments, labels or values are nested too deeply.",),
    ),
}


def dashboard(
    backend: SQLAlchemyResultBackend[Any],
    *,
    authorize: Authorize | None = None,
    broker: AsyncBroker | None = None,
    show_values: bool = False,
    title: str = "Tasks",
) -> Starlette:
    """Returns a dashboard of the tasks of a backend; mount it into your application.

        app.mount("/tasks", dashboard(backend, authorize=permission_of))

    Your application starts the backend with `broker.startup()`, and shuts it down. Until it is
    started, the pages have status 503. All URLs are relative, so the dashboard works below any
    prefix and behind a proxy that strips one. It also works in Litestar, or alone under any ASGI
    server.

    Args:
        backend: Your result backend.
        authorize: Takes the Starlette request and returns the permission of its user: "none",
            "read", or "write" (run tasks again, forget, release, discard). It may be async. Raise
            your framework's HTTPException to request a login. Without authorize, every request
            gets status 403.
        broker: Runs tasks again. With a SQLAlchemyBroker, its queues and schedules are shown.
        show_values: True decodes and shows return values, errors and progress of any serializer.
            False shows them only if they are JSON, because reading a pickle can execute code.
        title: Heading of the pages.

    Raises:
        ConfigurationError: An argument is invalid.
    """
    if not isinstance(backend, SQLAlchemyResultBackend):
        raise ConfigurationError(
            f"backend must be a SQLAlchemyResultBackend, not {type(backend).__qualname__}"
        )
    if broker is not None and not isinstance(broker, AsyncBroker):
        raise ConfigurationError(
            f"broker must be a taskiq broker or None, not {type(broker).__qualname__}"
        )
    _check_title(title)
    check_authorize(authorize)
    check_flag("show_values", show_values)
    site = Site(backend, broker, show_values, title)
    site.pages.extend(page for module in _MODULES for page in module.pages(site))
    turns = asyncio.Semaphore(_MOST_AT_ONCE)

    def refuse(request: Request, status: int, title: str, paragraphs: Iterable[str]) -> Response:
        return site.message(request, status, title, paragraphs, is_let_in=False)

    async def not_found(request: Request, exc: Exception) -> Response:
        status = exc.status_code if isinstance(exc, HTTPException) else 404
        heading = "Page not found" if status == 404 else "Not supported here"
        knows = is_let_in(request)
        text = ["The menu above lists the pages."] if knows else []
        page = site.message(request, status, heading, text, is_let_in=knows)
        page.headers.update(getattr(exc, "headers", None) or {})  # such as Allow
        return page

    return Starlette(
        routes=[
            Route("/healthz", Health(backend).answer),
            Route("/static/{name}", asset),
            *(_route_of(site, page, turns) for page in site.pages),
        ],
        middleware=[
            Middleware(Guard, authorize=authorize, refuse=refuse),
            Middleware(TrailingSlashes),
        ],
        exception_handlers={HTTPException: not_found},
    )


def _check_title(title: object) -> None:
    if not isinstance(title, str) or not title.strip():
        raise ConfigurationError(f"title must be a non-empty str, not {title!r}")


class TrailingSlashes:
    """Makes relative URLs correct, even if the server has changed the path.

    The path of the first page ends with a slash, those of other pages do not. Litestar adds a
    slash to the path only, so the path as the browser sent it is checked.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on without the slash at the end of its path, or redirects it."""
        if scope["type"] == "http":
            path = route_path(scope)
            target = _redirect_of(scope, path)
            if target is not None and scope["method"] in {"GET", "HEAD"}:
                query = scope.get("query_string", b"").decode("latin-1")
                response = RedirectResponse(f"{target}?{query}" if query else target, 307)
                await response(scope, receive, send)
                return
            root_path = scope.get("root_path", "").rstrip("/")
            path = f"{root_path}/{path.strip('/')}"
            scope = {**scope, "root_path": root_path, "path": path}
        await self._app(scope, receive, send)


def _redirect_of(scope: Scope, path: str) -> str | None:
    """The URL to redirect to, so that the browser resolves relative URLs correctly; or None."""
    sent: str = scope.get("raw_path", b"").partition(b"?")[0].decode("latin-1") or scope["path"]
    name = path.strip("/")
    if not name:
        return None if sent.endswith("/") or not sent else f"./{sent.rpartition('/')[2]}/"
    return f"../{name}" if sent.endswith("/") and "/" not in name else None


def _route_of(site: Site, page: Page, turns: asyncio.Semaphore) -> Route:
    async def answer(request: Request) -> Response:
        if page.needs_write and not may_write(request):
            text = "Your account may see these tasks, but not change anything."
            return site.message(request, 403, "Read only", [text])
        try:
            if request.method == "POST":  # no time limit: the outcome of a change must be known
                return await page.handler(site, request)
            async with asyncio.timeout(SECONDS), turns:
                return await page.handler(site, request)
        except tuple(_EXCUSES) as exc:
            return site.message(request, *_excuse_of(exc))

    return Route(f"/{page.path}", answer, methods=list(page.methods))


def _excuse_of(exc: Exception) -> tuple[int, str, Iterable[str]]:
    """The status, the heading and the paragraphs of a page that cannot be shown."""
    if isinstance(exc, StorageError) and exc.sqlstate == _QUERY_CANCELED:
        return 503, "The query took too long", [_TOO_LONG, str(exc)]
    status, heading, text = next(_EXCUSES[kind] for kind in _EXCUSES if isinstance(exc, kind))
    return status, heading, text or [str(exc)]
