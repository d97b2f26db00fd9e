"""Calls per second and latency of the four operations, by callers and size of the payload."""

import itertools
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import uuid4

import asyncpg
from taskiq.depends.progress_tracker import TaskProgress, TaskState

from benchmarks.contenders import CONTENDERS, Backend, make_payload, make_result, started
from benchmarks.floor import (
    BATCH_CALLERS,
    BATCHES,
    PREPARED,
    ROWS_PER_BATCH,
    TABLE,
    Floor,
    as_columns,
    open_floor,
)
from benchmarks.measure import Call, Load, Sample, Server, call_all, measure, plan_calls
from benchmarks.plan import Plan

OPERATIONS: Final = ("set_result", "set_progress", "is_result_ready", "get_result")
CALLERS: Final = {200: (1, 10, 100, 1000), 10_000: (1, 100)}  # by bytes of the payload
# With fewer callers than this there is no batch to fill.
_BATCHES_FROM_CALLERS: Final = 100
# More than there are callers, so that no two of them use the same row at once.
_STORED_TASKS: Final = 2000
_PRELOADERS: Final = 100

TaskIds = Callable[[int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Scenario:
    operation: str
    payload_bytes: int
    callers: int


SCENARIOS: Final = tuple(
    Scenario(operation, payload_bytes, callers)
    for operation in OPERATIONS
    for payload_bytes, all_callers in CALLERS.items()
    for callers in all_callers
)


@dataclass(frozen=True, slots=True)
class Throughput:
    """One contender in one scenario: medians over the rounds, and each round's rate."""

    operation: str
    payload_bytes: int
    callers: int
    contender: str
    per_second: float
    p50_ms: float
    p99_ms: float
    client_cpu: float
    server_cpu: float
    rounds: list[float]


async def measure_throughput(dsn: str, plan: Plan) -> list[Throughput]:
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        server = Server(connection.get_server_pid())
        backends = {
            contender.name: await stack.enter_async_context(started(contender, dsn, "throughput"))
            for contender in CONTENDERS
        }
        floor = await stack.enter_async_context(open_floor(dsn))
        stored = {size: _new_ids(_STORED_TASKS) for size in CALLERS}
        loads = {
            scenario: _loads(scenario, backends, floor, stored[scenario.payload_bytes])
            for scenario in SCENARIOS
        }

        async def prepare(scenario: Scenario) -> None:
            if scenario.operation == "set_result":
                # Else whoever is fast would soon have the largest table.
                tables = ", ".join([*(contender.table for contender in CONTENDERS), TABLE])
                await connection.execute(f"TRUNCATE {tables}")
            else:
                await _store(backends, scenario.payload_bytes, stored[scenario.payload_bytes])

        samples = await _measure_rounds(loads, plan, server, prepare)
    return [
        _summarize(scenario, load.contender, samples[scenario, load.contender])
        for scenario in SCENARIOS
        for load in loads[scenario]
    ]


async def _measure_rounds(
    loads: Mapping[Scenario, Sequence[Load]],
    plan: Plan,
    server: Server,
    prepare: Callable[[Scenario], Awaitable[None]],
) -> dict[tuple[Scenario, str], list[Sample]]:
    print("throughput: trial", flush=True)
    calls = {}
    for scenario in SCENARIOS:
        await prepare(scenario)
        for load in loads[scenario]:
            calls[scenario, load.contender] = await plan_calls(load, plan)
    samples: dict[tuple[Scenario, str], list[Sample]] = {key: [] for key in calls}
    for number in range(plan.rounds):
        print(f"throughput: round {number + 1} of {plan.rounds}", flush=True)
        for scenario in SCENARIOS:
            await prepare(scenario)
            # Whoever comes first meets what the scenario before has left.
            for load in _rotated(loads[scenario], number):
                key = scenario, load.contender
                samples[key].append(await measure(load, calls[key], server))
    return samples


def _rotated(loads: Sequence[Load], by: int) -> Sequence[Load]:
    by %= len(loads)
    return [*loads[by:], *loads[:by]]


def _summarize(scenario: Scenario, contender: str, samples: Sequence[Sample]) -> Throughput:
    return Throughput(
        scenario.operation,
        scenario.payload_bytes,
        scenario.callers,
        contender,
        per_second=statistics.median(sample.per_second for sample in samples),
        p50_ms=statistics.median(sample.p50_ms for sample in samples),
        p99_ms=statistics.median(sample.p99_ms for sample in samples),
        client_cpu=statistics.median(sample.client_cpu for sample in samples),
        server_cpu=statistics.median(sample.server_cpu for sample in samples),
        rounds=[sample.per_second for sample in samples],
    )


def _loads(
    scenario: Scenario, backends: Mapping[str, Backend], floor: Floor, stored: Sequence[str]
) -> list[Load]:
    loads = [
        Load(
            name,
            _call(backend, scenario.operation, make_payload(scenario.payload_bytes)),
            _new_ids if scenario.operation == "set_result" else partial(_repeated, stored),
            scenario.callers,
        )
        for name, backend in backends.items()
    ]
    if scenario.operation == "set_result":
        loads += _floor_loads(scenario, floor)
    return loads


def _floor_loads(scenario: Scenario, floor: Floor) -> list[Load]:
    row = floor.encode(make_payload(scenario.payload_bytes))
    loads = [Load(PREPARED, partial(floor.upsert, row), _new_ids, scenario.callers)]
    if scenario.callers >= _BATCHES_FROM_CALLERS:
        upsert_batch = partial(floor.upsert_batch, as_columns(row))
        loads.append(Load(BATCHES, upsert_batch, _new_batches, BATCH_CALLERS, ROWS_PER_BATCH))
    return loads


def _call(backend: Backend, operation: str, payload: str) -> Call:
    result = make_result(payload)
    progress = TaskProgress(state=TaskState.STARTED, meta={"text": payload})
    calls: dict[str, Call] = {
        "set_result": lambda task_id: backend.set_result(task_id, result),
        # The tasks that report progress have no result yet.
        "set_progress": lambda task_id: backend.set_progress(f"progress-{task_id}", progress),
        "is_result_ready": backend.is_result_ready,
        "get_result": backend.get_result,
    }
    return calls[operation]


async def _store(
    backends: Mapping[str, Backend], payload_bytes: int, task_ids: Sequence[str]
) -> None:
    payload = make_payload(payload_bytes)
    for backend in backends.values():
        if await backend.is_result_ready(task_ids[-1]):
            continue
        await call_all(_call(backend, "set_result", payload), task_ids, _PRELOADERS)
        assert await backend.is_result_ready(task_ids[-1])
        result = await backend.get_result(task_ids[-1])
        assert result.return_value == payload


def _new_ids(count: int) -> list[str]:
    return [uuid4().hex for _ in range(count)]


def _new_batches(count: int) -> list[list[str]]:
    # In order, as Upsert.of() puts them.
    return [sorted(_new_ids(ROWS_PER_BATCH)) for _ in range(count)]


def _repeated(task_ids: Sequence[str], count: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(task_ids), count))
