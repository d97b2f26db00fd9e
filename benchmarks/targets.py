"""What the figures are held to. Ratios are ratios of medians."""

from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.contenders import ASYNCPG_PEER, OURS
from benchmarks.floor import BATCHES, PREPARED
from benchmarks.overhead import BOTH, CALLERS, METADATA, TTL
from benchmarks.results import Results
from benchmarks.waiters import WAITERS
from benchmarks.waiting import BACKEND_WAITS, TASK_WAITS

_PEER: Final = ASYNCPG_PEER.name

# Operation, callers, bytes of the payload, compared with, at least so many times its calls/s.
_RATES: Final = (
    ("set_result", 10, 200, _PEER, 1.7),
    ("set_result", 100, 200, _PEER, 5),
    ("set_result", 1000, 200, _PEER, 5),
    ("set_result", 100, 200, BATCHES, 0.5),
    ("set_result", 1000, 200, BATCHES, 0.5),
    ("set_result", 100, 10_000, _PEER, 2),
    ("set_progress", 100, 200, _PEER, 4),
    ("is_result_ready", 100, 200, _PEER, 6),
    ("get_result", 100, 200, _PEER, 4),
)
# Operation, compared with, at most so many times its median latency with one caller.
_LATENCIES: Final = (
    ("set_result", _PEER, 1.1),
    ("set_result", PREPARED, 1.15),
    ("is_result_ready", _PEER, 1.15),
    ("get_result", _PEER, 1.15),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and the bound that it is to keep."""

    figure: str
    bound: Literal["at least", "at most"]
    limit: float
    measured: float
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        if self.bound == "at least":
            return self.measured >= self.limit
        return self.measured <= self.limit


def targets(results: Results) -> list[Target]:
    return [
        *_rates(results),
        *_latencies(results),
        *_overhead(results),
        *_waiting(results),
        *_waiters(results),
    ]


def _rates(results: Results) -> list[Target]:
    return [
        Target(
            f"{operation}, {callers:,} callers, {payload_bytes:,} B: calls/s beside {other}",
            "at least",
            limit,
            results.throughput_of(OURS.name, operation, callers, payload_bytes).per_second
            / results.throughput_of(other, operation, callers, payload_bytes).per_second,
        )
        for operation, callers, payload_bytes, other, limit in _RATES
    ]


def _latencies(results: Results) -> list[Target]:
    return [
        Target(
            f"{operation}, 1 caller, 200 B: p50 beside {other}",
            "at most",
            limit,
            results.throughput_of(OURS.name, operation, 1).p50_ms
            / results.throughput_of(other, operation, 1).p50_ms,
        )
        for operation, other, limit in _LATENCIES
    ]


def _overhead(results: Results) -> list[Target]:
    return [
        Target(
            f"set_result, {CALLERS} callers, 200 B, with {what}: calls/s beside those without",
            "at least",
            0.9,
            results.overhead_of(variant).ratio,
        )
        for variant, what in ((TTL, "TTL"), (METADATA, "metadata"), (BOTH, "TTL and metadata"))
    ]


def _waiting(results: Results) -> list[Target]:
    ours = results.waiting_of(OURS, BACKEND_WAITS)
    peer = results.waiting_of(ASYNCPG_PEER, TASK_WAITS)
    return [
        Target(
            f"waiting for a 10 ms task: time beyond it, p50, {_PEER}'s beside ours",
            "at least",
            20,
            peer.beyond_p50_ms / ours.beyond_p50_ms,
        ),
        Target(
            "waiting for a 10 ms task: from the commit to the waiter, p50",
            "at most",
            5,
            ours.after_commit_p50_ms,
            unit="ms",
        ),
    ]


def _waiters(results: Results) -> list[Target]:
    ours = results.waiters_of(OURS, BACKEND_WAITS).statements_per_second
    peer = results.waiters_of(ASYNCPG_PEER, TASK_WAITS).statements_per_second
    return [
        Target(
            f"{WAITERS:,} waiters: statements, ours as a part of {_PEER}'s",
            "at most",
            0.01,
            ours / peer,
        ),
        Target(f"{WAITERS:,} waiters: statements", "at most", 5, ours, unit="/s"),
    ]
