"""Pages that change data: a GET shows a confirmation, and only a POST makes the change."""

from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from taskiq.exceptions import SendTaskError

from taskiq_sa_pg.codec import UNREAD
from taskiq_sa_pg.exceptions import NotResendableError, ResultDecodeError
from taskiq_sa_pg.ui.detail import task_id_of
from taskiq_sa_pg.ui.progress import may_decode
from taskiq_sa_pg.ui.site import Page, Site, query_string, redirect

_LABELS: Final = (
    "Some labels can only be read with the backend's serializer, and reading them may run code. "
    "If only programs that you trust can write to the tables, pass show_values=True to dashboard()."
)


def pages(site: Site) -> list[Page]:
    """The pages to forget a task and, if there is a broker, to run one again."""
    both = ("GET", "POST")
    pages = [Page("forget", forget, methods=both, needs_write=True)]
    if site.broker is not None:
        pages.append(Page("rerun", rerun, methods=both, needs_write=True))
    return pages


async def forget(site: Site, request: Request) -> Response:
    """Deletes all stored data of a task."""
    task_id = task_id_of(request)
    if request.method == "POST":
        await site.backend.forget([task_id])
        text = f"All data of task {task_id} has been deleted."
        return site.message(request, 200, "Forgotten", [text])
    return site.confirm(
        request,
        question="Forget this task?",
        consequences=[
            f"The result, the progress and the status of task {task_id} are deleted for good.",
            "Clients that wait for the result will not receive it. A queued or running task "
            "continues, and stores its result when it finishes.",
        ],
        action="Forget it",
        back=f"task{query_string({'id': task_id})}",
        is_dangerous=True,
    )


async def rerun(site: Site, request: Request) -> Response:
    """Sends a task again, with its recorded arguments.

    Raises:
        ResultIsMissingError: The task has no result, or no longer has one.
        StorageError: PostgreSQL rejected a query or is unreachable.
    """
    task_id = task_id_of(request)
    if request.method != "POST":
        return site.confirm(
            request,
            question="Run this task again?",
            consequences=[
                f"A new task is sent with the recorded arguments and labels of task {task_id}. It "
                "gets a new id, and the label rerun_of with the old id.",
                "All effects of the first run may happen again.",
            ],
            action="Run it again",
            back=f"task{query_string({'id': task_id})}",
        )
    if not may_decode(site) and UNREAD in (await _labels_of(site, task_id)).values():
        return site.message(request, 409, "It cannot be run again from the dashboard", [_LABELS])
    try:
        sent = await site.backend.resend(site.broker, task_id)
    except (NotResendableError, ResultDecodeError, SendTaskError) as exc:
        # taskiq's own error does not include the reason.
        reason = exc.__cause__ if isinstance(exc, SendTaskError) else None
        return site.message(request, 409, "It cannot be run again", [str(reason or exc)])
    return redirect("task", id=sent.task_id, sent="1")


async def _labels_of(site: Site, task_id: str) -> Mapping[str, Any]:
    details = await site.backend.get_details(task_id)
    return details.record.labels
