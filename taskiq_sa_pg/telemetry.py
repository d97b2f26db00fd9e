"""Counts what a backend does; also reports it to OpenTelemetry if that is installed.

Only OpenTelemetry's API is used, which does nothing until the application sets up an SDK.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal, get_args
from weakref import WeakSet

try:
    from opentelemetry import context, metrics, trace
except ImportError:  # without the extra otel
    _HAS_OPENTELEMETRY = False
else:
    _HAS_OPENTELEMETRY = True

Operation = Literal[
    "set_result",
    "set_progress",
    "is_result_ready",
    "get_result",
    "get_progress",
    "set_status",
    "get_status",
]

ListenerState = Literal["off", "idle", "connecting", "replica", "listening"]

_SCOPE: Final = "taskiq_sa_pg"

# OpenTelemetry's SDK keeps at most this number of links per span.
MAX_LINKS: Final = 128


@dataclass(frozen=True, slots=True)
class BatchStats:
    """The calls of one operation, and the batches in which they were sent.

    Attributes:
        calls: Number of calls.
        batches: Number of batches sent to PostgreSQL, including failed ones.
        largest: Number of tasks in the largest batch.
        waited: Seconds that the first call of each batch waited for the batch, in total.
        longest_wait: Longest time in seconds that a call waited for its batch.
        pending: Number of tasks whose calls have not been answered yet.
    """

    calls: int
    batches: int
    largest: int
    waited: float
    longest_wait: float
    pending: int


@dataclass(frozen=True, slots=True)
class Stats:
    """What a backend has done in this process since it was created.

    Attributes:
        operations: The calls by operation: "set_result", "get_result" and so on.
        retries: Number of retried statements.
        pruned: Deleted rows by table: "results", "progress", "status".
        listener: "listening" while notifications wake waiting clients, "connecting" before that,
            "replica" if the server is a read replica, which has no notifications, "idle" if no
            client waits, "off" with notify=False.
        waiters: Number of calls that now wait for results or progress.
    """

    operations: Mapping[str, BatchStats]
    retries: int
    pruned: Mapping[str, int]
    listener: ListenerState
    waiters: int


class BatchMeter:
    """Counts the calls and batches of one operation, and creates spans for the batches."""

    def __init__(self, operation: str = "", table: str = "") -> None:
        self.calls = 0
        self.is_tracing = False  # whether calls must record their caller()
        self.queues: list[Any] = []  # queues of waiting calls; each has a number `pending`
        self.attributes: Final[Mapping[str, Any]] = {
            "db.system.name": "postgresql",
            "db.operation.name": operation,
            "db.collection.name": table,
        }
        self._name = f"{operation} {table}"
        self._batches = self._largest = 0
        self._waited = self._longest_wait = 0.0

    def caller(self) -> Any:
        """The span context of the current caller."""
        return trace.get_current_span().get_span_context()

    def flushing(self, entries: Collection[Any]) -> AbstractContextManager[Any] | None:
        """Counts a batch that begins now, and returns the span to run it in, if any.

        An entry has waited `since` a time of time.perf_counter(). The last item of each of its
        `calls` is the caller.
        """
        size = len(entries)
        waited = time.perf_counter() - next(iter(entries)).since
        self._batches += 1
        self._largest = max(self._largest, size)
        self._waited += waited
        self._longest_wait = max(self._longest_wait, waited)
        if not _HAS_OPENTELEMETRY:
            return None
        _BATCH_SIZE.record(size, self.attributes)
        _QUEUE_WAIT.record(waited, self.attributes)
        self.is_tracing = _is_tracing()
        if not self.is_tracing:
            return None
        attributes = self.attributes
        if size > 1:
            attributes = {**attributes, "db.operation.batch.size": size}
        return _span(self._name, attributes, [call[-1] for e in entries for call in e.calls])

    @property
    def pending(self) -> int:
        """Number of tasks whose calls have not been answered yet."""
        return sum(queue.pending for queue in self.queues)

    @property
    def stats(self) -> BatchStats:
        """The counts of this operation."""
        return BatchStats(
            self.calls, self._batches, self._largest, self._waited, self._longest_wait, self.pending
        )


class Telemetry:
    """All counts of one backend."""

    def __init__(
        self,
        table: str,
        listener: Callable[[], ListenerState] = lambda: "idle",
        waiters: Callable[[], int] = lambda: 0,
    ) -> None:
        self.attributes: Final = {"db.system.name": "postgresql", "db.collection.name": table}
        self.meters: Final[Mapping[Operation, BatchMeter]] = {
            operation: BatchMeter(operation, table) for operation in get_args(Operation)
        }
        self.listener: Final = listener
        self.waiters: Final = waiters
        self._retries = 0
        self._pruned = {"results": 0, "progress": 0, "status": 0}
        _LIVE.add(self)

    @property
    def stats(self) -> Stats:
        """The counts until now."""
        return Stats(
            {operation: meter.stats for operation, meter in self.meters.items()},
            self._retries,
            dict(self._pruned),
            self.listener(),
            self.waiters(),
        )

    def note_retry(self) -> None:
        """Counts a statement that is retried."""
        self._retries += 1
        if _HAS_OPENTELEMETRY:
            _RETRIES.add(1, self.attributes)

    def note_pruned(self, rows_of: str, number: int) -> None:
        """Counts deleted rows of "results", "progress" or "status"."""
        self._pruned[rows_of] += number
        if _HAS_OPENTELEMETRY and number:
            _PRUNED.add(number, {**self.attributes, "taskiq_sa_pg.rows": rows_of})

    def pruning(self) -> AbstractContextManager[Any]:
        """A span for one run of prune(), as a child of the caller's span."""
        if not (_HAS_OPENTELEMETRY and _is_tracing()):
            return nullcontext()
        attributes = {**self.attributes, "db.operation.name": "prune"}
        name = f"prune {self.attributes['db.collection.name']}"
        return _span(name, attributes, [trace.get_current_span().get_span_context()])


# Observed by the gauges. Weak, because OpenTelemetry's API never releases a callback.
_LIVE: Final[WeakSet[Telemetry]] = WeakSet()


def _is_tracing() -> bool:
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def _span(
    name: str, attributes: Mapping[str, Any], callers: Iterable[Any]
) -> AbstractContextManager[Any]:
    known = (caller for caller in callers if caller is not None and caller.is_valid)
    callers = list(islice(known, MAX_LINKS))
    if len(callers) == 1:
        parent = trace.set_span_in_context(trace.NonRecordingSpan(callers[0]))
    else:  # a root span, with links to its callers
        parent = context.Context()
    return trace.get_tracer(_SCOPE).start_as_current_span(
        name,
        parent,
        kind=trace.SpanKind.CLIENT,
        attributes=attributes,
        links=[trace.Link(caller) for caller in callers] if len(callers) > 1 else [],
    )


def _pending(_options: Any) -> "list[metrics.Observation]":
    meters = [meter for each in list(_LIVE) for meter in each.meters.values()]
    return [metrics.Observation(meter.pending, meter.attributes) for meter in meters]


def _listening(_options: Any) -> "list[metrics.Observation]":
    return [
        metrics.Observation(int(each.listener() == "listening"), each.attributes)
        for each in list(_LIVE)
    ]


def _waiting(_options: Any) -> "list[metrics.Observation]":
    return [metrics.Observation(each.waiters(), each.attributes) for each in list(_LIVE)]


if _HAS_OPENTELEMETRY:
    _meter = metrics.get_meter(_SCOPE)
    _BATCH_SIZE = _meter.create_histogram("taskiq_sa_pg.batch.size", "{task}", "Tasks in one batch")
    _QUEUE_WAIT = _meter.create_histogram(
        "taskiq_sa_pg.queue.wait", "s", "Time that the first call of a batch waited for it"
    )
    _RETRIES = _meter.create_counter("taskiq_sa_pg.retries", "{retry}", "Retried statements")
    _PRUNED = _meter.create_counter("taskiq_sa_pg.pruned", "{row}", "Rows deleted by prune()")
    for _name, _observe, _unit, _text in (
        ("pending", _pending, "{task}", "Tasks whose calls have not been answered yet"),
        ("listener", _listening, "1", "1 while notifications wake waiting clients, else 0"),
        ("waiters", _waiting, "{waiter}", "Calls that wait for results or progress"),
    ):
        _meter.create_observable_gauge(f"taskiq_sa_pg.{_name}", [_observe], _unit, _text)
