"""prune() on a million rows of which half have expired, and set_result meanwhile."""

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Executable

from benchmarks.contenders import Backend, make_payload, make_result
from benchmarks.large.plan import LargePlan
from benchmarks.large.tables import HALF_EXPIRED, PAYLOAD_BYTES, Tables
from benchmarks.measure import percentile
from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.layout import Layout
from taskiq_sa_pg.pruning import Pruning
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.telemetry import Telemetry

WRITERS: Final = 10
PAUSE: Final = 0.002

_RESTING: Final = False
_AT_WORK: Final = True


@dataclass(frozen=True, slots=True)
class Latency:
    """Of set_result, in one kind of windows."""

    calls: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class PruningCost:
    """Of pruning all expired rows, while others are stored.

    Attributes:
        deleted: How many rows were.
        seconds: That it worked, its pauses included.
        statements: How many there were.
        statement_p50_ms: What one of them took.
        statement_max_ms: The longest.
        resting: set_result in the windows in which pruning rests.
        at_work: set_result in the others.
    """

    deleted: int
    seconds: float
    statements: int
    statement_p50_ms: float
    statement_max_ms: float
    resting: Latency
    at_work: Latency


class _WatchedStore(Store):
    """Notes how long statements take."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.seconds: list[float] = []

    async def fetch(
        self,
        statement: Executable,
        parameters: Mapping[str, Any],
        purpose: str,
        *,
        retry_timeout: float | None = None,
    ) -> Sequence[Any]:
        started = time.perf_counter()
        rows = await super().fetch(statement, parameters, purpose, retry_timeout=retry_timeout)
        self.seconds.append(time.perf_counter() - started)
        return rows


async def measure_pruning(tables: Tables, plan: LargePlan) -> PruningCost:
    print(f"pruning: a table of {plan.rows:,} rows", flush=True)
    models = await tables.make("large_pruning")
    await tables.fill(models, range(plan.rows), HALF_EXPIRED)
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        tables.dsn, table_name=models.config.table_name
    )
    store = _WatchedStore(tables.dsn)
    await backend.startup()
    await store.open()
    is_at_work = asyncio.Event()
    latencies: defaultdict[bool, list[float]] = defaultdict(list)
    writers = [asyncio.create_task(_write(backend, is_at_work, latencies)) for _ in range(WRITERS)]
    await asyncio.sleep(plan.window)  # its connections are open then
    latencies.clear()
    print("pruning", flush=True)
    pruning = Pruning(store, Layout(models), None, Telemetry("bench"), is_exclusive=False)
    deleted, seconds = await _prune_by_turns(pruning, is_at_work, plan.window)
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    await store.close()
    await backend.shutdown()
    await tables.drop(models)
    assert deleted == plan.rows // 2
    return PruningCost(
        deleted,
        seconds,
        statements=len(store.seconds),
        statement_p50_ms=statistics.median(store.seconds) * 1000,
        statement_max_ms=max(store.seconds) * 1000,
        resting=_summarize(latencies[_RESTING]),
        at_work=_summarize(latencies[_AT_WORK]),
    )


async def _prune_by_turns(
    pruning: Pruning, is_at_work: asyncio.Event, window: float
) -> tuple[int, float]:
    """How many rows were deleted, and in how many seconds of work."""
    deleted, seconds = 0, 0.0
    while True:
        await asyncio.sleep(window)
        is_at_work.set()
        started = time.perf_counter()
        pruned = await pruning.run(time_budget=window)
        seconds += time.perf_counter() - started
        is_at_work.clear()
        deleted += pruned.results
        if pruned.is_complete:
            return deleted, seconds


async def _write(
    backend: Backend, is_at_work: asyncio.Event, latencies: Mapping[bool, list[float]]
) -> None:
    result = make_result(make_payload(PAYLOAD_BYTES))
    while True:
        kind, started = is_at_work.is_set(), time.perf_counter()
        await backend.set_result(uuid4().hex, result)
        latencies[kind].append(time.perf_counter() - started)
        await asyncio.sleep(PAUSE)


def _summarize(seconds: Sequence[float]) -> Latency:
    p50, p99 = (percentile(seconds, fraction) * 1000 for fraction in (0.50, 0.99))
    return Latency(len(seconds), p50, p99)
