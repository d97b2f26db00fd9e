"""The closed loop: callers who call again as soon as their last call has returned."""

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

Call = Callable[[str], Awaitable[object]]

# With one call each, a thousand callers would show only their common start.
_CALLS_PER_CALLER: Final = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a run measures. The defaults are the full run; QUICK is for a look.

    Attributes:
        rounds: How often calls are measured; the figures are medians over the rounds.
        seconds: How long one measurement of calls takes.
        waits: How often a task is waited for.
        window: Seconds for which the statements of waiters are counted.
        worker_rounds: How often worker processes are measured.
    """

    rounds: int = 9
    seconds: float = 0.3
    waits: int = 40
    window: float = 10
    worker_rounds: int = 6


QUICK: Final = Plan(rounds=2, seconds=0.1, waits=5, window=2, worker_rounds=1)


class Sample(NamedTuple):
    """One measurement, or the medians of several."""

    per_second: float
    p50_ms: float
    p99_ms: float


async def measure(call: Call, task_ids: Iterator[str], callers: int, seconds: float) -> Sample:
    gc.collect()
    started = time.perf_counter()
    latencies = await call_until(call, task_ids, callers, seconds)
    return Sample(len(latencies) / (time.perf_counter() - started), *percentiles(latencies))


async def call_until(
    call: Call, task_ids: Iterator[str], callers: int, seconds: float
) -> list[float]:
    """Calls for so many seconds; returns the latency of each call, in ms."""
    latencies: list[float] = []
    least = _CALLS_PER_CALLER * callers
    deadline = time.perf_counter() + seconds

    async def caller() -> None:
        before = time.perf_counter()
        while before < deadline or len(latencies) < least:
            await call(next(task_ids))
            after = time.perf_counter()
            latencies.append((after - before) * 1000)
            before = after

    await asyncio.gather(*(caller() for _ in range(callers)))
    return latencies


async def call_each(call: Call, task_ids: Iterable[str], callers: int) -> None:
    """Calls once with each of the ids."""
    shared = iter(task_ids)

    async def caller() -> None:
        for task_id in shared:
            await call(task_id)

    await asyncio.gather(*(caller() for _ in range(callers)))


def medians(samples: Sequence[Sample]) -> Sample:
    return Sample(*(median(values) for values in zip(*samples, strict=True)))


def percentiles(values: Iterable[float]) -> tuple[float, float]:
    """p50 and p99: the nearest rank, a value that was measured."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * 0.50) - 1], ordered[math.ceil(len(ordered) * 0.99) - 1]
