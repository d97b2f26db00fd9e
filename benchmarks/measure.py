"""The closed loop: callers who call again as soon as their last call has returned."""

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil

from benchmarks.plan import Plan

Call = Callable[[Any], Awaitable[object]]

_LEAST_CALLS: Final = 20


@dataclass(frozen=True, slots=True)
class Load:
    """What is called, and how.

    Attributes:
        contender: Whose figures these are.
        call: Takes one of the arguments.
        arguments: Makes the arguments of so many calls, before the clock starts.
        callers: How many call at once.
        results_per_call: More than one where a call is a batch.
    """

    contender: str
    call: Call
    arguments: Callable[[int], Sequence[Any]]
    callers: int
    results_per_call: int = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement; CPU seconds are those of 1,000 results, latencies those of one call."""

    per_second: float
    p50_ms: float
    p99_ms: float
    client_cpu: float
    server_cpu: float


class Server:
    """The processes of a PostgreSQL server, found through one of its backends."""

    def __init__(self, backend_pid: int) -> None:
        self._postmaster = psutil.Process(backend_pid).parent()

    def cpu_seconds(self) -> float:
        """What the server has used so far, processes that have ended included."""
        assert self._postmaster is not None
        times = self._postmaster.cpu_times()
        seconds = times.user + times.system + times.children_user + times.children_system
        for process in self._postmaster.children():
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds += used.user + used.system
        return float(seconds)


async def measure(load: Load, calls: int, server: Server) -> Sample:
    arguments = load.arguments(calls)
    gc.collect()
    client_cpu, server_cpu = time.process_time(), server.cpu_seconds()
    started = time.perf_counter()
    latencies = await call_all(load.call, arguments, load.callers)
    seconds = time.perf_counter() - started
    thousands = calls * load.results_per_call / 1000
    return Sample(
        per_second=calls * load.results_per_call / seconds,
        p50_ms=percentile(latencies, 0.50) * 1000,
        p99_ms=percentile(latencies, 0.99) * 1000,
        client_cpu=(time.process_time() - client_cpu) / thousands,
        server_cpu=(server.cpu_seconds() - server_cpu) / thousands,
    )


async def plan_calls(load: Load, plan: Plan) -> int:
    """How many calls to measure, by a short trial, which warms up too."""
    trial = max(_LEAST_CALLS, load.callers)
    started = time.perf_counter()
    await call_all(load.call, load.arguments(trial), load.callers)
    calls = math.ceil(plan.seconds * trial / (time.perf_counter() - started))
    return max(calls, _LEAST_CALLS, plan.calls_per_caller * load.callers)


def percentile(values: Iterable[float], fraction: float) -> float:
    """The nearest rank: a value that was measured."""
    ordered = sorted(values)
    return ordered[math.ceil(fraction * len(ordered)) - 1]


async def call_all(call: Call, arguments: Sequence[Any], callers: int) -> list[float]:
    latencies: list[float] = []
    shared = iter(arguments)

    async def caller() -> None:
        for argument in shared:
            started = time.perf_counter()
            await call(argument)
            latencies.append(time.perf_counter() - started)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return latencies
