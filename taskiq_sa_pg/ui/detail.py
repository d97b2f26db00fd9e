"""The page of one task in any state: its data, and the actions on it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, get_args

from starlette.requests import Request
from starlette.responses import Response

from taskiq_sa_pg.endpoints import EventResponse, encode_event
from taskiq_sa_pg.exceptions import ResultIsMissingError
from taskiq_sa_pg.results import RERUN_LABEL, Outcome, TaskDetails, TaskStatus
from taskiq_sa_pg.ui.formatting import pretty
from taskiq_sa_pg.ui.progress import may_decode, read_progress
from taskiq_sa_pg.ui.site import Page, Site

# Ids are never longer, because they are in an index.
_MAX_ID: Final = 3_000

_MOVING: Final = frozenset({"queued", "started", "retrying", "lost"})


@dataclass(frozen=True)
class Step:
    """A point in time of a task, and the time from there to the next step.

    Attributes:
        name: What happened.
        style: Its class in style.css.
        at: When; None if it has not happened yet.
        seconds: Seconds until the next step, or until now; None if unknown.
        span: The name of that time.
    """

    name: str
    style: str
    at: datetime | None
    seconds: float | None = None
    span: str = ""


@dataclass(frozen=True)
class Values:
    """A task's return value or error as text, or the reason why it is hidden."""

    return_value: str | None = None
    error: str | None = None
    hidden: str | None = None


def pages(_: Site) -> list[Page]:
    """The page of a task, and its stream of events."""
    return [Page("task", task), Page("follow", follow)]


def task_id_of(request: Request) -> str:
    """The task id from the query; in a path, servers and proxies would rewrite some ids."""
    return request.query_params.get("id", "")


async def task(site: Site, request: Request) -> Response:
    """Everything about one task."""
    task_id = task_id_of(request)
    status = await site.backend.get_status(task_id)
    details = await _details_of(site, task_id)
    progress = (await read_progress(site, [task_id])).get(task_id)
    was_just_sent = "sent" in request.query_params
    is_known = status.state != "unknown" or details is not None or progress is not None
    if not is_known and not was_just_sent:
        return site.render(request, "unknown.html", {"task_id": task_id, "active": "tasks"}, 404)
    now = datetime.now(UTC)
    context = {
        "active": "tasks",
        "task_id": task_id,
        "status": status,
        "details": details,
        "record": None if details is None else details.record,
        "progress": progress,
        "steps": steps_of(status, details, now),
        "values": _values_of(site, details),
        "error_text": None if details is None else error_text(details),
        "is_moving": status.state in _MOVING or (not is_known and was_just_sent),
        "was_just_sent": was_just_sent,
        "can_rerun": site.broker is not None,
        "arguments": arguments_of(details),
        "rerun_of": _rerun_of(details),
        "rerun_label": RERUN_LABEL,
        "now": now,
    }
    return site.render(request, "task.html", context)


async def follow(site: Site, request: Request) -> Response:
    """Server-sent events: `refresh` when the task's page has changed, and `end` at the end."""
    if request.method == "HEAD":
        return EventResponse()  # without events, so it ends at once
    task_id = task_id_of(request)
    # An invalid id must raise an error before a stream with status 200 begins.
    site.backend.models.config.to_column_task_id(task_id)
    rows = site.backend.runtime.wait.watch_progress_rows(task_id)

    async def events() -> AsyncGenerator[bytes, None]:
        async with aclosing(rows):
            async for _ in rows:
                yield encode_event("refresh", "")
        yield encode_event("end", "")

    return EventResponse(events())


async def _details_of(site: Site, task_id: str) -> TaskDetails | None:
    try:
        # Payloads are read and decoded only if that executes no code: see may_decode().
        return await site.backend.get_details(task_id, with_result=may_decode(site))
    except ResultIsMissingError:
        return None


def arguments_of(details: TaskDetails | None) -> list[tuple[Any, Any]]:
    """The recorded arguments, by position and by name."""
    if details is None:
        return []
    return [*enumerate(details.args or ()), *(details.kwargs or {}).items()]


def _rerun_of(details: TaskDetails | None) -> str | None:
    """The id of the task that was sent again as this task; a label can have any value."""
    value = None if details is None else details.record.labels.get(RERUN_LABEL)
    return value if isinstance(value, str) and len(value) <= _MAX_ID else None


def _values_of(site: Site, details: TaskDetails | None) -> Values:
    if details is None:
        return Values()
    if not may_decode(site):
        return Values(
            hidden="Values are not shown: this backend stores them with "
            f"{type(site.backend.settings.codec.serializer).__qualname__}, and reading them may "
            "execute code. If only programs that you trust can write to the tables, pass "
            "show_values=True to dashboard()."
        )
    if details.result is None:
        return Values(hidden=details.undecodable or "The result cannot be read.")
    result = details.result
    if result.error is not None:
        return Values(error=_text_of(result.error))
    return Values(return_value=pretty(result.return_value))


def _text_of(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as exc:  # noqa: BLE001 - anyone's __str__
        text = f"(no text: str() raised {type(exc).__qualname__})"
    return text or type(error).__qualname__


def error_text(details: TaskDetails) -> str | None:
    """The text of the error, taken from its traceback, without decoding."""
    name, traceback = details.record.error_type, details.traceback
    if not traceback:
        return name
    lines = traceback.rstrip().split("\n")
    starts = [n for n, line in enumerate(lines) if name and line.startswith(name)]
    return "\n".join(lines[starts[-1] if starts else -1 :])


def steps_of(status: TaskStatus, details: TaskDetails | None, now: datetime) -> list[Step]:
    """The steps of a task; for an unfinished task, including the next one."""
    if status.state in get_args(Outcome) and details is not None:
        record = details.record
        return _line(
            [
                Step("Queued", "", record.queued_at, span="waited"),
                Step("Started", "", record.started_at, span="ran"),
                Step(record.outcome.capitalize(), record.outcome, record.finished_at),
            ]
        )
    if status.state == "unknown":
        return []
    steps = [Step("Queued", "", status.queued_at, span="waited")]
    if status.started_at is not None and status.state != "queued":
        steps.append(Step("Started", "", status.started_at, span="ran"))
    if status.finished_at is not None:
        return _line([*steps, Step("Finished", "", status.finished_at)])
    to_come = {"queued": "Start", "retrying": "Next attempt"}.get(status.state, "Finish")
    span = {"queued": "waits", "retrying": "failed"}.get(status.state, "runs")
    if status.state == "lost":
        to_come, span = "Lost", "its worker stopped responding"
    steps[-1] = Step(steps[-1].name, "", steps[-1].at, span=span)
    return _line([*steps, Step(to_come, "pending", None)], now)


def _line(steps: list[Step], now: datetime | None = None) -> list[Step]:
    known = [step for step in steps if step.at is not None or step.style == "pending"]
    line: list[Step] = []
    for step, following in zip(known, [*known[1:], None], strict=True):
        end: Any = None if following is None else following.at or now
        seconds = None
        if end is not None and step.at is not None:
            # If two clocks differ, a task may seem to finish before its start.
            seconds = max((end - step.at).total_seconds(), 0.0)
        line.append(Step(step.name, step.style, step.at, seconds, step.span))
    return line
