"""All figures of a run, and what they are held to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from benchmarks.contenders import OURS, OURS_TRACKED, PEER, REDIS_PEER, Contender
from benchmarks.measure import Plan
from benchmarks.throughput import LARGE, OPERATIONS, Scenario, Throughput, compare
from benchmarks.waiters import WAITERS, WaitersCost
from benchmarks.waiting import BACKEND_WAITS, TASK_WAITS, Waits, Way
from benchmarks.worker import PROCESSES, InWorker

# At least so many times the peer's calls per second.
_RATES: Final = {
    Scenario("set_result", 100): 5,
    Scenario("set_result", 1000): 5,
    Scenario("set_progress", 100): 5,
    Scenario("set_progress", 1000): 5,
    Scenario("is_result_ready", 100): 5,
    Scenario("is_result_ready", 1000): 2,
    Scenario("get_result", 100): 5,
    Scenario("get_result", 1000): 2,
    Scenario("set_result", 100, LARGE): 1.8,
    Scenario("get_result", 100, LARGE): 1.8,
}
# At most so many times the peer's median latency, with one caller.
_LATENCY: Final = 1.1
# At most so many statements a second of all waiters.
_STATEMENTS: Final = {TASK_WAITS: 150, BACKEND_WAITS: 5}
# Of two worker processes: at least so many times the other's tasks a second.
_IN_THE_WORKER: Final = (
    (OURS, PEER, 1.3),
    (OURS, REDIS_PEER, 0.9),
    (OURS_TRACKED, OURS, 0.75),
)
_PER_STATEMENT: Final = 3


@dataclass(frozen=True, slots=True)
class Results:
    plan: Plan
    contenders: list[Contender]
    environment: list[list[str]]
    throughput: Throughput
    waiting: dict[Way, Waits]
    connections: dict[Contender, int]
    waiters: dict[Way, WaitersCost]
    in_worker: InWorker | None

    def most_connections(self, contender: Contender) -> tuple[int, int]:
        """Of a thousand callers, and of a thousand waiters."""
        waiters = [cost for way, cost in self.waiters.items() if way.contender == contender]
        return self.connections[contender], max(cost.connections for cost in waiters)


class Target(NamedTuple):
    """A figure, and its bound."""

    figure: str
    bound: str
    measured: float
    unit: str
    noise: float | None
    is_met: bool


def targets(results: Results) -> Iterator[Target]:
    beside = f"{OURS.name} / {PEER.name}"
    if results.in_worker is not None:
        yield from _in_worker(results.in_worker)
    for scenario, least in _RATES.items():
        size = ", 10 kB" if scenario.payload_bytes == LARGE else ""
        figure = f"`{scenario.operation}`, {scenario.callers:,} callers{size}: calls/s, {beside}"
        value, noise = compare(results.throughput, scenario, "per_second")
        yield Target(figure, f"at least {least}x", value, "x", noise, value >= least)
    for operation in OPERATIONS:
        figure = f"`{operation}`, 1 caller: p50, {beside}"
        value, noise = compare(results.throughput, Scenario(operation, 1), "p50_ms")
        yield Target(figure, f"at most {_LATENCY}x", value, "x", noise, value <= _LATENCY)
    for method, most in _STATEMENTS.items():
        figure = f"{WAITERS:,} waiters in `{method}`: statements/s of {OURS.name}"
        rate = results.waiters[Way(OURS, method)].statements_per_second
        yield Target(figure, f"at most {most}/s", rate, "/s", None, rate <= most)


def _in_worker(in_worker: InWorker) -> Iterator[Target]:
    processes = PROCESSES[-1]
    rates = {each: in_worker.executed[processes, each] for _, each in in_worker.executed}
    for one, other, least in _IN_THE_WORKER:
        figure = f"{processes} worker processes: tasks/s, {one.name} / {other.name}"
        value = rates[one].per_second / rates[other].per_second
        yield Target(figure, f"at least {least}x", value, "x", None, value >= least)
    figure = f"{processes} worker processes: results a statement of {OURS.name}"
    value = rates[OURS].per_statement
    yield Target(figure, f"at least {_PER_STATEMENT}", value, "", None, value >= _PER_STATEMENT)
