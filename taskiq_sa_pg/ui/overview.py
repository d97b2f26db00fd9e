"""The first page: how many tasks finished, how long they took, and which tasks run now."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.results import TaskStatus
from taskiq_sa_pg.statements import Bucket
from taskiq_sa_pg.ui.charts import Chart, Series, lines, stacked_bars
from taskiq_sa_pg.ui.formatting import duration, plural
from taskiq_sa_pg.ui.progress import read_progress
from taskiq_sa_pg.ui.site import Page, Site

# Maximum number of running tasks on the page.
_MAX_RUNNING: Final = 20

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Window:
    """A time window that ends now, and its buckets.

    Attributes:
        name: Its name in the URL.
        words: Its name on pages: "6 hours" in "the last 6 hours".
        length: Length of the window.
        width: Length of one bucket.
        refresh: Seconds between refreshes of the page; more for longer windows, which cost more.
        ticks: Labels below a chart, from left to right, before "now".
    """

    name: str
    words: str
    length: timedelta
    width: timedelta
    refresh: int
    ticks: tuple[str, ...]


_MINUTE: Final = timedelta(minutes=1)
_HOUR: Final = timedelta(hours=1)

WINDOWS: Final = {
    window.name: window
    for window in (
        Window("1h", "hour", _HOUR, _MINUTE, 5, ("−60 min", "−45 min", "−30 min", "−15 min")),
        Window("6h", "6 hours", 6 * _HOUR, 5 * _MINUTE, 10, ("−6 h", "−4.5 h", "−3 h", "−1.5 h")),
        Window(
            "24h", "24 hours", 24 * _HOUR, 20 * _MINUTE, 30, ("−24 h", "−18 h", "−12 h", "−6 h")
        ),
        Window(
            "7d",
            "7 days",
            168 * _HOUR,
            2 * _HOUR,
            120,
            tuple(f"−{days} d" for days in range(7, 0, -1)),
        ),
    )
}
DEFAULT_WINDOW: Final = "1h"


@dataclass(frozen=True)
class Figures:
    """The buckets of a window, including empty ones, and their total."""

    window: Window
    since: datetime
    now: datetime
    buckets: list[Bucket]
    total: Bucket

    def minutes_of(self, bucket: Bucket) -> float:
        """Minutes of a bucket until now; at least one, because the newest has only begun."""
        assert bucket.start is not None
        seconds = min(self.window.width, self.now - bucket.start).total_seconds()
        return max(seconds, 60) / 60


def pages(_: Site) -> list[Page]:
    """The overview."""
    return [Page("", overview, nav="Overview")]


async def overview(site: Site, request: Request) -> Response:
    """The figures of a window, and the running tasks."""
    name = request.query_params.get("window", DEFAULT_WINDOW)
    window = WINDOWS.get(name, WINDOWS[DEFAULT_WINDOW])
    figures = await read_figures(site, window)
    running = await site.backend.get_running(_MAX_RUNNING + 1)
    context = {
        "windows": WINDOWS.values(),
        "window": window,
        "total": figures.total,
        "finished": figures.total.succeeded + figures.total.failed,
        "charts": _charts(figures),
        "is_tracked": site.backend.track is not None,
        "running": running[:_MAX_RUNNING],
        "has_more_running": len(running) > _MAX_RUNNING,
        "progress": await read_progress(site, [status.task_id for status in running]),
        "oldest": await _oldest_queued(site),
        "now": figures.now,
    }
    return site.render(request, "overview.html", context)


async def read_figures(site: Site, window: Window) -> Figures:
    """Reads the figures of the window, which ends with the current bucket."""
    now = datetime.now(UTC)
    until = now - (now - _EPOCH) % window.width + window.width
    since = until - window.length
    rows = await site.backend.runtime.database.fetch(
        site.select_buckets,
        {"since": since, "until": until, "width": window.width},
        "count finished tasks",
    )
    found = {bucket.start: bucket for bucket in map(Bucket._make, rows)}
    starts = [since + n * window.width for n in range(window.length // window.width)]
    buckets = [found.get(start, Bucket(start, 0, 0, None, None)) for start in starts]
    return Figures(window, since, now, buckets, found[None])


async def _oldest_queued(site: Site) -> TaskStatus | None:
    if site.select_oldest_queued is None:
        return None
    rows = await site.backend.runtime.database.fetch(
        site.select_oldest_queued, {"limit": 1}, "find the oldest queued task"
    )
    if not rows:
        return None
    row = sql.StatusRow._make(rows[0])
    return TaskStatus(str(row.task_id), "queued", row.task_name, row.attempt, row.queued_at)


def _charts(figures: Figures) -> list[Chart]:
    window, total = figures.window, figures.total
    last = f"the last {window.words}"
    counts = [
        f"{_when(figures, b)}: {b.succeeded:,} succeeded, {b.failed:,} failed"
        for b in figures.buckets
    ]
    finished = stacked_bars(
        "Finished per minute",
        f"Tasks that finished per minute in {last}; in total "
        f"{plural(total.succeeded, 'success', 'successes')} and "
        f"{plural(total.failed, 'failure')}.",
        [
            Series(
                "succeeded", "succeeded", [_rate(figures, b, b.succeeded) for b in figures.buckets]
            ),
            Series("failed", "failed", [_rate(figures, b, b.failed) for b in figures.buckets]),
        ],
        counts,
        [*window.ticks, "now"],
    )
    return [
        finished,
        _percentiles(figures, "Execution time", "Tasks took", lambda b: b.execution),
        _percentiles(figures, "Time in the queue", "Tasks waited", lambda b: b.waiting),
    ]


def _percentiles(
    figures: Figures, title: str, verb: str, of: Callable[[Bucket], list[float] | None]
) -> Chart:
    p50, p95 = _both(of(figures.total))
    hints = [
        f"{_when(figures, b)}: {_in_words(of(b))}, {plural(b.succeeded + b.failed, 'task')}"
        for b in figures.buckets
    ]
    return lines(
        title,
        f"{verb} {duration(p50)} (median) and at most {duration(p95)} in 95 of 100 cases in the "
        f"last {figures.window.words}.",
        [
            Series("p95", "p95", [_both(of(b))[1] for b in figures.buckets]),
            Series("p50 (median)", "p50", [_both(of(b))[0] for b in figures.buckets]),
        ],
        hints,
        [*figures.window.ticks, "now"],
    )


def _both(values: list[float] | None) -> tuple[float | None, float | None]:
    p50, p95 = values or (None, None)
    return _drawable(p50), _drawable(p95)


def _drawable(seconds: float | None) -> float | None:
    if seconds is None or not isfinite(seconds):
        return None
    return max(seconds, 0.0)  # negative if two clocks differ


def _in_words(values: list[float] | None) -> str:
    p50, p95 = _both(values)
    return "no data" if p50 is None else f"p50 {duration(p50)}, p95 {duration(p95)}"


def _rate(figures: Figures, bucket: Bucket, count: int) -> float:
    return count / figures.minutes_of(bucket)


def _when(figures: Figures, bucket: Bucket) -> str:
    assert bucket.start is not None
    end = bucket.start + figures.window.width
    day = "" if figures.window.length <= timedelta(days=1) else f"{bucket.start:%a %d %b} "
    return f"{day}{bucket.start:%H:%M}–{end:%H:%M} UTC"
