"""The operations on a table with a million rows beside one with few, by turns."""

import itertools
import random
import statistics
import time
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

# Which results an operation is about.
NEW: Final = "new"
NEW_AFTER_CHECKPOINT: Final = "new, after a checkpoint"
ORDERED_AFTER_CHECKPOINT: Final = "new in order, after a checkpoint"
RECENT: Final = "recent"
ANY: Final = "any"

# In this order, because a checkpoint is felt for some ten thousand results: no round of the first
# asks for one.
OPERATIONS: Final = (
    ("set_result", NEW),
    ("set_result", NEW_AFTER_CHECKPOINT),
    ("set_result", ORDERED_AFTER_CHECKPOINT),
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
        rounds = _Rounds(tables, plan, {_SMALL: small, _LARGE: large})
        scenarios = [
            _Scenario(operation, results, callers, calls)
            for operation, results in OPERATIONS
            for callers, calls in plan.calls
        ]
        measured = [(scenario, await rounds.measure(scenario)) for scenario in scenarios]
    shared_buffers = await tables.connection.fetchval("SHOW shared_buffers")
    return [_summarize(shared_buffers, scenario, samples) for scenario, samples in measured]


async def _open(stack: AsyncExitStack, tables: Tables, name: str) -> _Table:
    models = await tables.make(f"large_calls_{name}")
    contender = Contender(
        name,
        models.config.table_name,
        lambda dsn, table: SQLAlchemyResultBackend(dsn, table_name=table),
    )
    backend = await stack.enter_async_context(started(contender, tables.dsn, name))
    return _Table(models, backend)


class _Rounds:
    """Measures one scenario after the other, each on both tables by turns."""

    def __init__(self, tables: Tables, plan: LargePlan, both: Mapping[str, _Table]) -> None:
        self._tables = tables
        self._plan = plan
        self._both = both
        self._server = Server(tables.connection.get_server_pid())
        # Always others: who asks again soon is taken for one who waits.
        self._fresh = itertools.count(0, plan.few_rows)
        self._oldest_recent = plan.rows

    async def measure(self, scenario: _Scenario) -> list[dict[str, Sample]]:
        print(f"calls: {', '.join(map(str, scenario[:3]))} at once", flush=True)
        rounds = []
        for number in range(-1, self._plan.rounds):
            numbers = await self._prepare(scenario)
            samples = {}
            for name in random.sample([_SMALL, _LARGE], 2):
                load = _load(name, self._both[name].backend, scenario, numbers[name])
                samples[name] = await measure(load, scenario.calls, self._server)
            if number >= 0:  # the first one is to warm up
                rounds.append(samples)
        return rounds

    async def _prepare(self, scenario: _Scenario) -> dict[str, range]:
        """The numbers of the results that each table has for this round."""
        start = next(self._fresh)
        numbers = {
            _SMALL: range(start, start + self._plan.few_rows),
            _LARGE: range(self._plan.rows),
        }
        small, large = self._both[_SMALL].models, self._both[_LARGE].models
        if scenario.results == RECENT:
            newest, self._oldest_recent = self._oldest_recent, self._oldest_recent - scenario.calls
            numbers[_LARGE] = range(self._oldest_recent, newest)
            await self._tables.warm(large, numbers[_LARGE])
        await self._tables.truncate(small)
        if scenario.operation != "set_result":
            await self._tables.fill(small, numbers[_SMALL])
        if scenario.results in (NEW_AFTER_CHECKPOINT, ORDERED_AFTER_CHECKPOINT):
            await self._tables.checkpoint()
        return numbers


def _load(name: str, backend: Backend, scenario: _Scenario, numbers: range) -> Load:
    if scenario.operation == "set_result":
        result = make_result(make_payload(PAYLOAD_BYTES))
        make_ids = _ids_in_order if scenario.results == ORDERED_AFTER_CHECKPOINT else _new_ids
        return Load(
            name, lambda task_id: backend.set_result(task_id, result), make_ids, scenario.callers
        )
    call = getattr(backend, scenario.operation)
    return Load(name, call, partial(_ids_of, numbers), scenario.callers)


def _new_ids(count: int) -> list[str]:
    return [uuid4().hex for _ in range(count)]


def _ids_in_order(count: int) -> list[str]:
    """UUIDs of version 7, of which those of one millisecond are in no order; 20 a millisecond."""
    now = time.time_ns() // 1_000_000
    return [f"{now + n // 20:012x}7{uuid4().hex[13:]}" for n in range(count)]


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
