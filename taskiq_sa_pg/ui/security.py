"""Permissions, and the security headers of every response.

Pages decide nothing: every request passes through Guard first.
"""

import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Literal, cast, get_args
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskiq_sa_pg.exceptions import ConfigurationError

logger = logging.getLogger(__name__)

Permission = Literal["none", "read", "write"]
Authorize = Callable[[Request], Permission | Awaitable[Permission]]

# Creates the page of a refusal from the request, status, title and paragraphs.
Refuse = Callable[[Request, int, str, Iterable[str]], Response]

CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ]
)

_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not "no-referrer", with which browsers send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}

_PERMISSION: Final = "taskiq_sa_pg.ui.permission"
_SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
_PORTS: Final = {"http": 80, "https": 443}

# Paths without task data: files of the package, and the health check.
_OPEN: Final = re.compile(r"/static/[\w.-]+|/healthz/?")

_LEFT_OUT: Final = (
    "dashboard() was called without authorize, so all access is denied.",
    "Pass a function that takes the request and returns the permission of its user: "
    '"none", "read" or "write".',
    'dashboard(backend, authorize=lambda request: "read" if is_admin(request) else "none")',
)

_NOT_FROM_HERE: Final = (
    "The request did not come from a page of this dashboard, so nothing was changed.",
    "If it did, a proxy without TLS has changed the Host header. Configure the proxy to forward "
    "the browser's Host header with its port.",
)


def check_authorize(authorize: object) -> None:
    """Checks that authorize is callable or None.

    Raises:
        ConfigurationError: It is something else, such as a permission.
    """
    if authorize is not None and not callable(authorize):
        raise ConfigurationError(
            "authorize must be a function that takes the request and returns "
            f'"none", "read" or "write", not {authorize!r}'
        )


def is_let_in(request: HTTPConnection) -> bool:
    """Whether authorize has permitted a request; open paths do not need it."""
    return _PERMISSION in request.scope


def may_write(request: HTTPConnection) -> bool:
    """Whether the user of a permitted request may make changes."""
    return request.scope.get(_PERMISSION) == "write"


def route_path(scope: Scope) -> str:
    """The path below the dashboard's mount point, with one leading slash.

    Servers may combine a root path that ends with a slash with a path that begins with one.
    """
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "").rstrip("/")
    is_below = path == root_path or path.startswith(f"{root_path}/")
    return "/" + (path.removeprefix(root_path) if is_below else path).lstrip("/")


class Guard:
    """Passes on permitted requests, and adds security headers to every response.

    Args:
        app: The application that receives permitted requests.
        authorize: Returns the permission of a user; None denies all access.
        refuse: Creates the page of a refusal.
    """

    def __init__(self, app: ASGIApp, *, authorize: Authorize | None, refuse: Refuse) -> None:
        self._app = app
        self._authorize = authorize
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        is_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope, receive)
        try:
            refusal = await self._refusal_of(request)
            await (refusal or self._app)(scope, receive, send_with_headers)
        except Exception:
            # With %r: the decoded path may contain line breaks that imitate log entries.
            logger.exception("the dashboard cannot answer %s %r", scope["method"], scope["path"])
            if is_begun:
                raise  # the server must abort the response that it has partly sent
            text = "An error occurred in the dashboard. The server's log has the details."
            broken = self._refuse(request, 500, "Something went wrong", [text])
            await broken(scope, receive, send_with_headers)

    async def _refusal_of(self, request: Request) -> Response | None:
        is_safe = request.method in _SAFE_METHODS
        if self._authorize is None:
            return self._refuse(request, 403, "Access is not configured", _LEFT_OUT)
        if is_safe and _OPEN.fullmatch(route_path(request.scope)):
            return None
        try:
            permission = await _permission_of(request, self._authorize)
        except Exception as exc:
            # Applications of all frameworks request a login like this: 401, or a redirect.
            status = getattr(exc, "status_code", None)
            if not isinstance(status, int) or not 300 <= status < 500:
                raise
            text = str(getattr(exc, "detail", ""))
            refusal = self._refuse(request, status, "Not permitted", [text])
            refusal.headers.update(getattr(exc, "headers", None) or {})
            return refusal
        reason = _reason_against(request, permission, is_safe=is_safe)
        if reason is not None:
            return self._refuse(request, 403, *reason)
        request.scope[_PERMISSION] = permission
        return None


async def _permission_of(request: Request, authorize: Authorize) -> Permission:
    """Calls authorize and returns the permission.

    Raises:
        TypeError: It returned something else.
    """
    answer: Any = authorize(request)
    if inspect.isawaitable(answer):
        answer = await answer
    if not isinstance(answer, str) or answer not in get_args(Permission):
        raise TypeError(
            f'authorize must return "none", "read" or "write", not {type(answer).__qualname__}'
            f" {answer!r}"
        )
    return cast("Permission", answer)


def _reason_against(
    request: Request, permission: Permission, *, is_safe: bool
) -> tuple[str, list[str]] | None:
    """The title and the text of a refusal; None if the request is permitted."""
    if permission == "none":
        return "Not permitted", ["Your account may not see these tasks."]
    if is_safe:
        return None
    if not is_from_own_page(request.headers):
        return "Not from this dashboard", list(_NOT_FROM_HERE)
    if permission != "write":
        return "Read only", ["Your account may see these tasks, but not change anything."]
    return None


def is_from_own_page(headers: Headers) -> bool:
    """Whether a request comes from a page of this site, according to the browser's headers.

    `Sec-Fetch-Site` decides if it is sent, because it is correct even behind a proxy that changes
    Host. Browsers omit it without TLS; all of them send Origin with a POST.
    """
    fetch_site = headers.get("sec-fetch-site")
    if fetch_site is not None:
        return fetch_site == "same-origin"
    try:
        origin = urlsplit(headers.get("origin", ""))
        own = urlsplit(f"//{headers.get('host', '')}")
        default = _PORTS[origin.scheme]
        places = [(each.hostname, each.port or default) for each in (origin, own)]
    except (KeyError, ValueError):  # no origin, "null", or an invalid one
        return False
    return origin.hostname is not None and places[0] == places[1]
