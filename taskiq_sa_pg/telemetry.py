"""What a backend does, in figures: always counted, and told to OpenTelemetry where it is installed.

Of OpenTelemetry only the API is used, which does nothing until the application sets up an SDK.
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

# What OpenTelemetry's SDK keeps of a span's links.
MAX_LINKS: Final = 128


@dataclass(frozen=True, slots=True)
class BatchStats:
    """The calls of one operation, and the batches in which they were sent.

    Attributes:
        calls: How many calls there were.
        batches: How many batches went to PostgreSQL, those that failed included.
        largest: How many tasks the largest batch had.
        waited: For how many seconds the first calls of all batches together waited for theirs.
        longest_wait: For how many seconds a call waited for its batch at most.
        pending: How many tasks have calls now that are not answered yet.
    """

    calls: int
    batches: int
    largest: int
    waited: float
    longest_wait: float
    pending: int


@dataclass(frozen=True, slots=True)
class Stats:
    """What a backend has done since it was made, in this process.

    Attributes:
        operations: The calls by operation: "set_result", "get_result" and so on.
        retries: How often a statement was tried again.
        pruned: Deleted rows by table: "results", "progress", "status".
        listener: "listening" while waiters are woken by push, "connecting" before that, "replica"
            where the server is a read replica and so cannot, "idle" where nobody waits, "off" with
            notify=False.
        waiters: How many wait for results or progress now.
    """

    operations: Mapping[str, BatchStats]
    retries: int
    pruned: Mapping[str, int]
    listener: ListenerState
    waiters: int


class BatchMeter:
    """Counts the calls and batches of one operation, and makes spans of the batches."""

    def __init__(self, operation: str = "", table: str = "") -> None:
        self.calls = 0
        self.is_tracing = False  # whether calls have to say who their caller() is
        self.queues: list[Any] = []  # where calls wait; each has a number `pending`
        self.attributes: Final[Mapping[str, Any]] = {
            "db.system.name": "postgresql",
            "db.operation.name": operation,
            "db.collection.name": table,
        }
        self._name = f"{operation} {table}"
        self._batches = self._largest = 0
        self._waited = self._longest_wait = 0.0

    def caller(self) -> Any:
        """Who calls now: what its span is known by."""
        return trace.get_current_span().get_span_context()

    def flushing(self, entries: Collection[Any]) -> AbstractContextManager[Any] | None:
        """Counts a batch that begins now; what it is to run in, if anything.

        An entry has waited `since` then, by time.perf_counter(); each of its `calls` ends with its
        caller.
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
        """How many tasks have calls that are not answered yet."""
        return sum(queue.pending for queue in self.queues)

    @property
    def stats(self) -> BatchStats:
        """What was counted."""
        return BatchStats(
            self.calls, self._batches, self._largest, self._waited, self._longest_wait, self.pending
        )


class Telemetry:
    """All the figures of one backend."""

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
        """What was counted until now."""
        return Stats(
            {operation: meter.stats for operation, meter in self.meters.items()},
            self._retries,
            dict(self._pruned),
            self.listener(),
            self.waiters(),
        )

    def note_retry(self) -> None:
        """Counts a statement that is tried again."""
        self._retries += 1
        if _HAS_OPENTELEMETRY:
            _RETRIES.add(1, self.attributes)

    def note_pruned(self, rows_of: str, number: int) -> None:
        """Counts deleted rows of "results", "progress" or "status"."""
        self._pruned[rows_of] += number
        if _HAS_OPENTELEMETRY and number:
            _PRUNED.add(number, {**self.attributes, "taskiq_sa_pg.rows": rows_of})

    def pruning(self) -> AbstractContextManager[Any]:
        """Has a span for as long as a pruning takes, below that of whoever calls."""
        if not (_HAS_OPENTELEMETRY and _is_tracing()):
            return nullcontext()
        attributes = {**self.attributes, "db.operation.name": "prune"}
        name = f"prune {self.attributes['db.collection.name']}"
        return _span(name, attributes, [trace.get_current_span().get_span_context()])


# Those that gauges are asked of; OpenTelemetry's API never lets go of a callback.
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
    else:  # of no caller more than of the others
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
        "taskiq_sa_pg.queue.wait", "s", "For how long the first call of a batch waited for it"
    )
    _RETRIES = _meter.create_counter(
        "taskiq_sa_pg.retries", "{retry}", "Statements that were tried again"
    )
    _PRUNED = _meter.create_counter("taskiq_sa_pg.pruned", "{row}", "Rows that were deleted")
    for _name, _observe, _unit, _text in (
        ("pending", _pending, "{task}", "Tasks with calls that are not answered yet"),
        ("listener", _listening, "1", "1 while waiters are woken by push, else 0"),
        ("waiters", _waiting, "{waiter}", "Those that wait for results or progress"),
    ):
        _meter.create_observable_gauge(f"taskiq_sa_pg.{_name}", [_observe], _unit, _text)
