"""What all pages share: what the dashboard is about, and how a page becomes HTML.

A page is a path of one segment, a function, and perhaps an entry in the navigation. A module of
pages has a function that lists them, and app.py lists those.
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
    """What a dashboard was told, and what makes its pages.

    Attributes:
        backend: Whose tasks are shown.
        broker: What sends tasks again, and whose queues are shown; None for neither.
        shows_values: Whether values may be decoded, whatever their serializer runs.
        title: What the pages are called.
        pages: All of them, those with `nav` in the order of the navigation.
    """

    backend: SQLAlchemyResultBackend[Any]
    broker: Any
    shows_values: bool
    title: str
    pages: "list[Page]" = field(default_factory=list)

    # Built once, because Database.fetch() keeps what it has compiled.
    @cached_property
    def select_buckets(self) -> Select[Any]:
        """What has finished in a window."""
        return sql.select_buckets(self.backend.models)

    @cached_property
    def select_oldest_queued(self) -> Select[Any] | None:
        """The task that has waited longest; None where tasks are not tracked."""
        status = self.backend.models.status_table
        if status is None or self.backend.track is None:
            return None
        return sql.select_oldest_queued(status)

    @property
    def sqlalchemy_broker(self) -> SQLAlchemyBroker | None:
        """The broker, where it is ours and so has queues to show."""
        return self.broker if isinstance(self.broker, SQLAlchemyBroker) else None

    def render(
        self, request: Request, template: str, context: Mapping[str, Any], status: int = 200
    ) -> HTMLResponse:
        """A page made of a template, which extends base.html.

        Its links are relative to the dashboard's root: `{{ url("task", id=task_id) }}`.
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
        # What is no Unicode is escaped by formatting.visible(); this is for what has escaped that.
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
        """A page that only says something; without navigation for those who are not let in."""
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
        """A page that asks before something is changed: its button sends a POST to the same URL.

        So what is to be changed stands in the query, whose encoding keeps every character.

        Args:
            request: The GET request.
            question: The heading, such as "Forget this task?".
            consequences: What will be so afterwards, a paragraph each.
            action: The button's words.
            back: The page to go back to, relative to the root.
            is_dangerous: Whether something is lost.
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
        path: Its only segment, "" for the first page.
        handler: Answers its requests.
        nav: What the navigation calls it; None leaves it out.
        methods: Those that it takes; a POST always needs the permission to write.
        needs_write: Whether to look at it needs that, too: a page that asks before a change.
    """

    path: str
    handler: Handler
    nav: str | None = None
    methods: tuple[str, ...] = ("GET",)
    needs_write: bool = False


def redirect(page: str, **query: object) -> Response:
    """Leads to another page after a POST, by a relative URL."""
    return RedirectResponse(f"./{page}{query_string(query)}", 303)


def query_string(query: Mapping[str, object]) -> str:
    """The query of a URL with its question mark; without what is None or empty."""
    given = {name: value for name, value in query.items() if value is not None and value != ""}
    return f"?{urlencode(given, errors='replace')}" if given else ""


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=PackageLoader("taskiq_sa_pg.ui"),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=formatting.visible,  # whatever a template shows
    )
    environment.filters |= formatting.FILTERS
    return environment


_ENVIRONMENT: Final = _environment()
