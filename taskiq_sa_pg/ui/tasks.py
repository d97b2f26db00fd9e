"""The list of finished tasks, with a filter, in pages."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Final, get_args

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.results import Outcome
from taskiq_sa_pg.results import Page as Found
from taskiq_sa_pg.ui.site import Page, Site

_HOUR: Final = 3_600
_DAY: Final = 24 * _HOUR

# By name in the URL: how many seconds to look back, and the text on pages.
WINDOWS: Final[Mapping[str, tuple[int | None, str]]] = {
    "1h": (_HOUR, "in the last hour"),
    "6h": (6 * _HOUR, "in the last 6 hours"),
    "24h": (_DAY, "in the last 24 hours"),
    "7d": (7 * _DAY, "in the last 7 days"),
    "30d": (30 * _DAY, "in the last 30 days"),
    "all": (None, "at all"),
}
DEFAULT_WINDOW: Final = "24h"

# The position of an argument. No task has more arguments, and int() rejects very long texts.
_POSITION: Final = re.compile(r"-?[0-9]{1,6}")


@dataclass(frozen=True)
class Filter:
    """The filter of a list, as in the URL; "" matches everything."""

    outcome: str = ""
    name: str = ""
    worker: str = ""
    label: str = ""
    argument: str = ""
    window: str = DEFAULT_WINDOW

    @classmethod
    def of(cls, query: QueryParams) -> "Filter":
        """The filter of a URL; invalid values are ignored."""
        given = {name: query.get(name, "").strip() for name in asdict(cls())}
        if given["outcome"] not in get_args(Outcome):
            given["outcome"] = ""
        if given["window"] not in WINDOWS:
            given["window"] = DEFAULT_WINDOW
        return cls(**given)

    @property
    def is_narrow(self) -> bool:
        """Whether it has another condition than the time window."""
        return any((self.outcome, self.name, self.worker, self.label, self.argument))

    @property
    def wider(self) -> str | None:
        """The name of the next longer window; None if there is none."""
        names = list(WINDOWS)
        return dict(pairwise(names)).get(self.window)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments for find().

        Raises:
            ConfigurationError: The label has no value.
        """
        given: dict[str, Any] = {"window": WINDOWS[self.window][0]}
        for name in ("outcome", "name", "worker"):
            if value := getattr(self, name):
                given[name] = value
        if self.label:
            name, separator, value = self.label.partition("=")
            if not separator:
                raise ConfigurationError(
                    f"the label must be NAME=VALUE, such as user=42, not {name!r}"
                )
            given["label"] = {name.strip(): value.strip()}
        if self.argument:
            given["argument"] = _argument_of(self.argument)
        return given

    def but(self, **changes: str) -> dict[str, str]:
        """The query of a URL with the same filter and some changes."""
        values = {**asdict(self), **changes}
        return {name: value for name, value in values.items() if value}


def pages(_: Site) -> list[Page]:
    """The list."""
    return [Page("tasks", tasks, nav="Tasks")]


async def tasks(site: Site, request: Request) -> Response:
    """A page of the tasks that match a filter."""
    filter_ = Filter.of(request.query_params)
    after = request.query_params.get("after") or None
    found, problem = Found([], None), None
    try:
        found = await site.backend.find(after=after, **filter_.arguments)
    except ConfigurationError as exc:
        problem = str(exc)
    context = {
        "filter": filter_,
        "windows": WINDOWS,
        "found_in": WINDOWS[filter_.window][1],
        "records": found.records,
        "next": found.next,
        "after": after,
        "problem": problem,
        "is_new": not found.records and not problem and await _has_none(site),
        "now": datetime.now(UTC),
    }
    return site.render(request, "tasks.html", context, 400 if problem else 200)


async def _has_none(site: Site) -> bool:
    """Whether there is no finished task at all; fast, because find() searches in slices."""
    return not (await site.backend.find(limit=1)).records


def _argument_of(text: str) -> Any:
    """Parses `name=value`, `0=value` (first positional), `-1=value` (last), or any value."""
    name, separator, value = text.partition("=")
    name = name.strip()
    if not separator:
        return text
    if not name:  # `=a=b` is the value "a=b"
        return value.strip()
    return {int(name) if _POSITION.fullmatch(name) else name: value.strip()}
