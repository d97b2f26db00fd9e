"""The operations on a table with a million rows beside one with few, by turns."""

import itertools
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple
from uuid import uuid4

from benchmarks.contenders import Backend, Contender, make_payload, make_result, started
from benchmarks.large.plan import LargePlan
from benchmarks.large.tables import PAYLOAD_BYTES, Tables, id_of
from benchmarks.measure import Load, Sample, Server, measure
from taskiq_sa_pg import Models, SQLAlchemyResultBackend

NEW: Final = "new"
RECENT: Final = "recent"
ANY: Final = "any"

# Operations, and which results they are about.
OPERATIONS: Final = (
    ("set_result", NEW),
    ("is_result_ready", RECENT),
    ("get_result", RECENT),
    ("is_result_ready", ANY),
    ("get_result", ANY),
)

_SMALL: Final = "small"
_LARGE: Final = "large"


@dataclass(frozen=True, slots=True)
class Calls:
    """An operation with so many callers; medians of the rounds.

    Attributes:
        shared_buffers: The server's setting.
        operation: What is called.
        results: Which results of the large table it is about.
        callers: How many call at once.
        small_p50_ms: The median latency on the table with few rows.
        large_p50_ms: The same on the other.
        ratio: The median of the rounds' large to small.
        small_per_second: Calls a second.
        large_per_second: The same on the other.
    """

    shared_buffers: str
    operation: str
    results: str
    callers: int
    small_p50_ms: float
    large_p50_ms: float
    ratio: float
    small_per_second: float
    large_per_second: float


class _Scenario(NamedTuple):
    operation: str
    results: str
    callers: int
    calls: int


class _Table(NamedTuple):
    models: Models
    backend: Backend


async def measure_calls(tables: Tables, plan: LargePlan) -> list[Calls]:
    async with AsyncExitStack() as stack:
        small = await _open(stack, tables, _SMALL)
        large = await _open(stack, tables, _LARGE)
        print(f"calls: a table of {plan.rows:,} rows", flush=True)
        await tables.fill(large.models, range(plan.rows))
        scenarios = [
            _Scenario(operation, results, callers, calls)
            for operation, results in OPERATIONS
            for callers, calls in plan.calls
        ]
        rounds = await _measure_rounds(tables, plan, scenarios, {_SMALL: small, _LARGE: large})
    shared_buffers = await tables.connection.fetchval("SHOW shared_buffers")
    return [
        _summarize(shared_buffers, scenario, [each[scenario] for each in rounds])
        for scenario in scenarios
    ]


async def _open(stack: AsyncExitStack, tables: Tables, name: str) -> _Table:
    models = await tables.make(f"large_calls_{name}")
    contender = Contender(
        name,
        models.config.table_name,
        lambda dsn, table: SQLAlchemyResultBackend(dsn, table_name=table),
    )
    backend = await stack.enter_async_context(started(contender, tables.dsn, name))
    return _Table(models, backend)


async def _measure_rounds(
    tables: Tables,
    plan: LargePlan,
    scenarios: Sequence[_Scenario],
    both: Mapping[str, _Table],
) -> list[dict[_Scenario, dict[str, Sample]]]:
    server = Server(tables.connection.get_server_pid())
    # Always others: who asks again soon is taken for one who waits.
    fresh = itertools.count(0, plan.few_rows)
    oldest_recent = plan.rows
    rounds = []
    for number in range(-1, plan.rounds):
        print(f"calls: round {number + 1} of {plan.rounds}", flush=True)
        samples: dict[_Scenario, dict[str, Sample]] = {}
        for scenario in scenarios:
            samples[scenario] = {}
            start = next(fresh)
            numbers = {_SMALL: range(start, start + plan.few_rows), _LARGE: range(plan.rows)}
            if scenario.results == RECENT:
                numbers[_LARGE] = range(oldest_recent - scenario.calls, oldest_recent)
                oldest_recent -= scenario.calls
                await tables.warm(both[_LARGE].models, numbers[_LARGE])
            await tables.truncate(both[_SMALL].models)
            if scenario.operation != "set_result":
                await tables.fill(both[_SMALL].models, numbers[_SMALL])
            for name in random.sample([_SMALL, _LARGE], 2):
                load = _load(name, both[name].backend, scenario, numbers[name])
                samples[scenario][name] = await measure(load, scenario.calls, server)
        if number >= 0:  # the first one is to warm up
            rounds.append(samples)
    return rounds


def _load(name: str, backend: Backend, scenario: _Scenario, numbers: range) -> Load:
    if scenario.operation == "set_result":
        result = make_result(make_payload(PAYLOAD_BYTES))
        return Load(
            name, lambda task_id: backend.set_result(task_id, result), _new_ids, scenario.callers
        )
    call = getattr(backend, scenario.operation)
    return Load(name, call, partial(_ids_of, numbers), scenario.callers)


def _new_ids(count: int) -> list[str]:
    return [uuid4().hex for _ in range(count)]


def _ids_of(numbers: range, count: int) -> list[str]:
    return [id_of(number) for number in random.sample(numbers, count)]


def _summarize(
    shared_buffers: str, scenario: _Scenario, rounds: Sequence[Mapping[str, Sample]]
) -> Calls:
    def median(name: str, figure: Callable[[Sample], float]) -> float:
        return statistics.median(figure(samples[name]) for samples in rounds)

    return Calls(
        shared_buffers,
        scenario.operation,
        scenario.results,
        scenario.callers,
        small_p50_ms=median(_SMALL, lambda sample: sample.p50_ms),
        large_p50_ms=median(_LARGE, lambda sample: sample.p50_ms),
        ratio=statistics.median(
            samples[_LARGE].p50_ms / samples[_SMALL].p50_ms for samples in rounds
        ),
        small_per_second=median(_SMALL, lambda sample: sample.per_second),
        large_per_second=median(_LARGE, lambda sample: sample.per_second),
    )
