"""The broker's queues: their sizes, the parked tasks, and the schedules."""

import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from taskiq_sa_pg.broker import QueueCount, ScheduleInfo, SQLAlchemyBroker
from taskiq_sa_pg.exceptions import ConfigurationError, NotStartedError, StorageError
from taskiq_sa_pg.ui.formatting import plural
from taskiq_sa_pg.ui.site import Handler, Page, Site, query_string, redirect
from taskiq_sa_pg.ui.when import in_words

STATES: Final = ("waiting", "delayed", "running", "parked")

# Rows per page.
_MAX_PARKED: Final = 100
_MAX_SCHEDULES: Final = 500

# Characters of a schedule's arguments on the page.
_MAX_ARGUMENTS: Final = 200

# A running scheduler is never this late.
_LATE: Final = timedelta(minutes=1)

_UNDEFINED_TABLE: Final = "42P01"

_NOT_STARTED: Final = (
    "The broker of this dashboard is not started in this process, or it is started on another "
    "event loop, so its queues cannot be read.",
    "Call `await broker.startup()` when your application starts: in its lifespan.",
)
_NO_TABLES: Final = (
    "The tables of the broker do not exist in this database.",
    "Create them with `taskiq-sa-pg upgrade --queue`, or at startup with SQLAlchemyBroker(..., "
    "run_migrations=True).",
)


def pages(site: Site) -> list[Page]:
    """No pages without a SQLAlchemyBroker; schedules only if its models have their table."""
    broker = site.sqlalchemy_broker
    if broker is None:
        return []
    found = [
        Page("queues", _of(broker, queues), nav="Queues"),
        Page("parked", _of(broker, parked), nav="Parked"),
        Page("release", _of(broker, release), methods=("GET", "POST"), needs_write=True),
        Page("discard", _of(broker, discard), methods=("GET", "POST"), needs_write=True),
    ]
    if broker.models.schedules_table is not None:
        found.append(Page("schedules", _of(broker, schedules), nav="Schedules"))
    return found


_HandlerOfBroker = Callable[[Site, Request, SQLAlchemyBroker], Awaitable[Response]]


def _of(broker: SQLAlchemyBroker, handler: _HandlerOfBroker) -> Handler:
    """Wraps a handler: shows the remedy if the broker is not started or has no tables."""

    async def answer(site: Site, request: Request) -> Response:
        try:
            return await handler(site, request, broker)
        except NotStartedError:
            return site.message(request, 503, "The broker is not started", _NOT_STARTED)
        except StorageError as exc:
            if exc.sqlstate != _UNDEFINED_TABLE:
                raise
            return site.message(request, 503, "The broker has no tables", _NO_TABLES)

    return answer


async def queues(site: Site, request: Request, broker: SQLAlchemyBroker) -> Response:
    """The numbers of waiting, delayed, running and parked tasks, by queue and task name."""
    counts = await broker.get_queues()
    context = {
        "counts": counts,
        "totals": {state: _total(counts, state) for state in STATES},
        "oldest": max((each.oldest_waiting or 0 for each in counts if each.waiting), default=None),
        "shown": shown,
    }
    return site.render(request, "queues.html", context)


async def parked(site: Site, request: Request, broker: SQLAlchemyBroker) -> Response:
    """The parked tasks; the URL may select a queue and a task name."""
    chosen = _filter_of(request)
    found = await broker.get_parked(**chosen, limit=_MAX_PARKED + 1)
    context = {
        "found": found[:_MAX_PARKED],
        "has_more": len(found) > _MAX_PARKED,
        "queue": chosen["queue_name"],
        "task": chosen["task_name"],
        "notice": _notice_of(request),
        "max_deliveries": broker.settings.max_deliveries,
    }
    return site.render(request, "parked.html", context)


async def release(site: Site, request: Request, broker: SQLAlchemyBroker) -> Response:
    """Delivers parked tasks again, after a confirmation."""
    if request.method == "POST":
        count = await broker.release_parked(**_choice_of(request))
        return redirect("parked", **_back_to(request), released=count)
    return await _confirm(
        site,
        request,
        broker,
        verb="Release",
        consequences=[
            "A released task is delivered again immediately, and as often as a new task.",
            "Until it has run, its result is still the error that was stored when it was parked.",
        ],
    )


async def discard(site: Site, request: Request, broker: SQLAlchemyBroker) -> Response:
    """Deletes parked tasks, after a confirmation."""
    if request.method == "POST":
        count = await broker.discard_parked(**_choice_of(request))
        return redirect("parked", **_back_to(request), discarded=count)
    return await _confirm(
        site,
        request,
        broker,
        verb="Discard",
        consequences=[
            "A discarded task is deleted, and no worker will run it.",
            "Its result, an error, is kept.",
        ],
        is_dangerous=True,
    )


async def schedules(site: Site, request: Request, broker: SQLAlchemyBroker) -> Response:
    """The schedules: rules, last and next time, and arguments."""
    found = await broker.get_schedules(_MAX_SCHEDULES + 1)
    now = datetime.now(UTC)
    overdue = {each.schedule_id for each in found if _is_overdue(each, now)}
    context = {
        "found": found[:_MAX_SCHEDULES],
        "has_more": len(found) > _MAX_SCHEDULES,
        "overdue": overdue,
        "in_words": in_words,
        "arguments_of": arguments_of,
    }
    return site.render(request, "schedules.html", context)


async def _confirm(
    site: Site,
    request: Request,
    broker: SQLAlchemyBroker,
    *,
    verb: str,
    consequences: list[str],
    is_dangerous: bool = False,
) -> Response:
    choice = _choice_of(request)
    back = _back_to(request)
    what = f"task {request.query_params.get('id')}"
    if "task_ids" not in choice:
        count = await broker.runtime.admin.count_parked(**choice)
        if not count:
            return redirect("parked", **back)
        what = f"{plural(count, 'parked task')}{_of_filter(choice)}"
    # Without form fields: the form posts to this URL, whose encoding keeps every character of ids.
    return site.confirm(
        request,
        question=f"{verb} {what}?",
        consequences=consequences,
        action=verb,
        back=f"./parked{query_string(back)}",
        is_dangerous=is_dangerous,
    )


def _choice_of(request: Request) -> dict[str, Any]:
    """The tasks that a request selects: one by its id, or all that match a filter.

    Raises:
        ConfigurationError: It selects neither, or both.
    """
    task_id, is_all = request.query_params.get("id"), "all" in request.query_params
    if bool(task_id) == is_all:
        raise ConfigurationError("no tasks are selected: go back to the list and select them there")
    return _filter_of(request) if is_all else {"task_ids": [task_id]}


def _filter_of(request: Request) -> dict[str, str | None]:
    query = request.query_params
    return {"queue_name": query.get("queue") or None, "task_name": query.get("task") or None}


def _back_to(request: Request) -> dict[str, str | None]:
    """The query of the previous list, with its filter."""
    return {name: request.query_params.get(name) for name in ("queue", "task")}


def _of_filter(choice: Mapping[str, str | None]) -> str:
    task, queue = choice["task_name"], choice["queue_name"]
    return (f" of {task}" if task else "") + (f" in queue {queue}" if queue else "")


def _notice_of(request: Request) -> str:
    """A notice about the previous change, from the query of redirect()."""
    for word in ("released", "discarded"):
        count = request.query_params.get(word, "")
        if count.isascii() and count.isdigit() and len(count) < 10:
            return f"{plural(int(count), 'task')} {word}"
    return ""


def _total(counts: list[QueueCount], state: str) -> str:
    total = sum(getattr(each, state) for each in counts)
    return f"{total:,}{'+' if any(state in each.at_least for each in counts) else ''}"


def shown(count: QueueCount, state: str) -> str:
    """A count, with a plus if counting stopped early."""
    return f"{getattr(count, state):,}{'+' if state in count.at_least else ''}"


def _is_overdue(schedule: ScheduleInfo, now: datetime) -> bool:
    return schedule.next_due is not None and now - schedule.next_due > _LATE


def arguments_of(schedule: ScheduleInfo) -> str | None:
    """The arguments as in a Python call, shortened; None if they are unknown."""
    if schedule.args is None or schedule.kwargs is None:
        return None
    given = [_json(each) for each in schedule.args]
    given += [f"{name}={_json(each)}" for name, each in schedule.kwargs.items()]
    text = ", ".join(given)
    return text if len(text) <= _MAX_ARGUMENTS else f"{text[:_MAX_ARGUMENTS]}…"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
