"""What an expiry and the metadata of tasks cost of set_result's throughput."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from uuid import uuid4

import asyncpg
from taskiq import TaskiqResult

from benchmarks.contenders import Contender, make_payload, make_result, started
from benchmarks.measure import Load, Sample, Server, measure
from benchmarks.plan import Plan
from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.metadata import Metadata, attach

CALLERS: Final = 100
PLAIN: Final = "neither"
TTL: Final = "result_ttl"
METADATA: Final = "metadata"
BOTH: Final = "both"

# A round is short, so that whatever else the machine does disturbs few of them, or all variants.
_CALLS: Final = 5000
_PAYLOAD_BYTES: Final = 200
_TTL_SECONDS: Final = 3600

_Arguments = Callable[[int], Sequence[tuple[str, TaskiqResult[Any]]]]


@dataclass(frozen=True, slots=True)
class Overhead:
    """One variant of taskiq_sa_pg.

    Attributes:
        variant: What its results have.
        per_second: Calls of set_result; the median of the rounds.
        ratio: Its calls/s beside those of PLAIN in the same round; the median.
        quartiles: The lower and the upper one of these ratios.
        client_cpu: Seconds for 1,000 results, over all rounds: a round alone has few ticks of
            the server's clock.
        server_cpu: As client_cpu.
    """

    variant: str
    per_second: float
    ratio: float
    quartiles: tuple[float, float]
    client_cpu: float
    server_cpu: float


async def measure_overhead(dsn: str, plan: Plan) -> list[Overhead]:
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        loads = {
            PLAIN: await _load(stack, dsn, PLAIN, None, _new_results),
            TTL: await _load(stack, dsn, TTL, _TTL_SECONDS, _new_results),
            METADATA: await _load(stack, dsn, METADATA, None, _with_metadata),
            BOTH: await _load(stack, dsn, BOTH, _TTL_SECONDS, _with_metadata),
        }
        rounds = await _measure_rounds(loads, plan, connection)
    return [_summarize(variant, rounds) for variant in loads]


async def _load(
    stack: AsyncExitStack,
    dsn: str,
    variant: str,
    result_ttl: float | None,
    arguments: _Arguments,
) -> Load:
    contender = Contender(
        variant,
        _table(variant),
        lambda dsn, table: SQLAlchemyResultBackend(
            dsn, table_name=table, result_ttl=result_ttl, run_migrations=True
        ),
    )
    backend = await stack.enter_async_context(started(contender, dsn, "overhead"))
    return Load(variant, lambda call: backend.set_result(*call), arguments, CALLERS)


async def _measure_rounds(
    loads: Mapping[str, Load], plan: Plan, connection: asyncpg.Connection
) -> list[dict[str, Sample]]:
    print(f"overhead: {plan.overhead_rounds} rounds", flush=True)
    server = Server(connection.get_server_pid())
    rounds = []
    for number in range(-1, plan.overhead_rounds):
        samples = {}
        for variant in random.sample(list(loads), len(loads)):
            await connection.execute(f"TRUNCATE {_table(variant)}")
            samples[variant] = await measure(loads[variant], _CALLS, server)
        if number >= 0:  # the first one is to warm up
            rounds.append(samples)
    return rounds


def _summarize(variant: str, rounds: Sequence[Mapping[str, Sample]]) -> Overhead:
    samples = [each[variant] for each in rounds]
    ratios = [each[variant].per_second / each[PLAIN].per_second for each in rounds]
    lower, ratio, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Overhead(
        variant,
        per_second=statistics.median(sample.per_second for sample in samples),
        ratio=ratio,
        quartiles=(lower, upper),
        client_cpu=statistics.fmean(sample.client_cpu for sample in samples),
        server_cpu=statistics.fmean(sample.server_cpu for sample in samples),
    )


def _table(variant: str) -> str:
    return f"overhead_{variant}"


def _new_results(count: int) -> list[tuple[str, TaskiqResult[Any]]]:
    payload = make_payload(_PAYLOAD_BYTES)
    return [(uuid4().hex, make_result(payload)) for _ in range(count)]


def _with_metadata(count: int) -> list[tuple[str, TaskiqResult[Any]]]:
    """Results as the middleware hands them over: each task with times of its own."""
    calls = _new_results(count)
    describe = partial(Metadata, "shop.tasks:send_receipt", worker="worker-1.example.com:12345")
    for _, result in calls:
        now = time.time()
        attach(result, describe(queued_at=now - 0.01, started_at=now))
    return calls
