"""Shared by all pages: the dashboard's settings, and rendering to HTML.

A page is a path of one segment, a function, and optionally an entry in the navigation. Each module
of pages has a function that lists them; app.py lists the modules.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy import Select
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.broker import SQLAlchemyBroker
from taskiq_sa_pg.ui import formatting
from taskiq_sa_pg.ui.security import may_write, route_path
from taskiq_sa_pg.ui.static import asset_url


@dataclass(frozen=True)
class Site:
    """The settings of a dashboard, and the rendering of its pages.

    Attributes:
        backend: The backend whose tasks are shown.
        broker: Sends tasks again; its queues are shown, too. None disables both.
        shows_values: Whether values may be decoded with any serializer, even if it executes code.
        title: Heading of the pages.
        pages: All pages; those with `nav` are in the order of the navigation.
    """

    backend: SQLAlchemyResultBackend[Any]
    broker: Any
    shows_values: bool
    title: str
    pages: "list[Page]" = field(default_factory=list)

    # Built once, because Database.fetch() caches compiled statements.
    @cached_property
    def select_buckets(self) -> Select[Any]:
        """Counts the tasks that finished in a window."""
        return sql.select_buckets(self.backend.models)

    @cached_property
    def select_oldest_queued(self) -> Select[Any] | None:
        """Selects the task that has waited longest; None if tasks are not tracked."""
        status = self.backend.models.status_table
        if status is None or self.backend.track is None:
            return None
        return sql.select_oldest_queued(status)

    @property
    def sqlalchemy_broker(self) -> SQLAlchemyBroker | None:
        """The broker, if it is a SQLAlchemyBroker, which has queues to show."""
        return self.broker if isinstance(self.broker, SQLAlchemyBroker) else None

    def render(
        self, request: Request, template: str, context: Mapping[str, Any], status: int = 200
    ) -> HTMLResponse:
        """Renders a template, which extends base.html.

        Links are relative to the dashboard's root: `{{ url("task", id=task_id) }}`.
        """
        path = route_path(request.scope)
        root = "../" * (path.count("/") - 1) or "./"

        def url(page: str, **query: object) -> str:
            return f"{root}{page}{query_string(query)}"

        shared = {
            "site": self,
            "nav": [page for page in self.pages if page.nav],
            "here": path.removeprefix("/"),
            "may_write": may_write(request),
            "is_let_in": True,
            "url": url,
            "asset": lambda name: f"{root}{asset_url(name)}",
        }
        html = _ENVIRONMENT.get_template(template).render(shared | dict(context))
        # formatting.visible() escapes lone surrogates; "replace" is for any that it did not see.
        return HTMLResponse(html.encode("utf-8", "replace"), status)

    def message(
        self,
        request: Request,
        status: int,
        title: str,
        paragraphs: Iterable[str],
        *,
        is_let_in: bool = True,
    ) -> HTMLResponse:
        """Renders a page with a message; without navigation unless `is_let_in`."""
        context = {
            "heading": title,
            "paragraphs": list(paragraphs),
            "status": status,
            "is_let_in": is_let_in,
        }
        return self.render(request, "message.html", context, status)

    def confirm(
        self,
        request: Request,
        *,
        question: str,
        consequences: Iterable[str],
        action: str,
        back: str,
        is_dangerous: bool = False,
    ) -> HTMLResponse:
        """Renders a confirmation of a change; its button sends a POST to the same URL.

        The query of the URL names what to change; its encoding keeps every character.

        Args:
            request: The GET request.
            question: The heading, such as "Forget this task?".
            consequences: The effects of the change, one paragraph each.
            action: The text of the button.
            back: The page to return to, relative to the root.
            is_dangerous: Whether data is lost.
        """
        context = {
            "question": question,
            "consequences": list(consequences),
            "action": action,
            "back": back,
            "is_dangerous": is_dangerous,
        }
        return self.render(request, "confirm.html", context)


Handler = Callable[[Site, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Page:
    """A page of the dashboard.

    Attributes:
        path: Its only segment; "" for the first page.
        handler: Answers its requests.
        nav: Its name in the navigation; None omits it there.
        methods: Its HTTP methods; a POST always needs the permission "write".
        needs_write: Whether a GET needs that permission, too, as for confirmations.
    """

    path: str
    handler: Handler
    nav: str | None = None
    methods: tuple[str, ...] = ("GET",)
    needs_write: bool = False


def redirect(page: str, **query: object) -> Response:
    """Redirects to another page after a POST, by a relative URL."""
    return RedirectResponse(f"./{page}{query_string(query)}", 303)


def query_string(query: Mapping[str, object]) -> str:
    """The query of a URL with its question mark, without values that are None or empty."""
    given = {name: value for name, value in query.items() if value is not None and value != ""}
    return f"?{urlencode(given, errors='replace')}" if given else ""


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=PackageLoader("taskiq_sa_pg.ui"),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=formatting.visible,  # for every value in a template
    )
    environment.filters |= formatting.FILTERS
    return environment


_ENVIRONMENT: Final = _environment()
