"""`python -m benchmarks.large [--quick]`: what many results cost, pruning, and many processes.

The full run replaces LARGE.md beside this file; a quick one leaves its own in build/bench/.
"""

import argparse
import asyncio
import hashlib
import itertools
import random
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg
from sqlalchemy import Float, Insert, Text, case, cast, func, insert, select
from sqlalchemy.dialects import postgresql

from benchmarks.contenders import OURS, make_payload, make_result, new_ids, started
from benchmarks.environment import read_environment
from benchmarks.markdown import number, table
from benchmarks.measure import Call, Sample, measure, medians, percentiles
from benchmarks.processes import MAX_CONNECTIONS, measure_processes, processes_report
from benchmarks.servers import DURABLE, connected
from taskiq_sa_pg import Models, SQLAlchemyResultBackend
from taskiq_sa_pg.embedded import postgres

DIRECTORY: Final = Path(__file__).parent
RESULT: Final = make_result(make_payload(200))
RANDOM_IDS: Final = "`set_result`, random ids"
IDS_IN_ORDER: Final = "`set_result`, ids in order"
CALLS: Final = (RANDOM_IDS, IDS_IN_ORDER, "`is_result_ready`", "`get_result`")
CALLERS: Final = (1, 100)
FEW_ROWS: Final = 5000
WRITERS: Final = 10
PAUSE: Final = 0.002

Rows = list[list[str]]  # of a table in the report


class Plan(NamedTuple):
    """How much is measured; `window` is how long pruning works and rests, by turns."""

    rows: int = 1_000_000
    rounds: int = 9
    seconds: float = 0.3
    window: float = 0.5
    process_rounds: int = 7
    process_seconds: float = 0.8


QUICK: Final = Plan(
    rows=50_000, rounds=2, seconds=0.1, window=0.1, process_rounds=2, process_seconds=0.2
)


@dataclass(frozen=True, slots=True)
class Results:
    """A table, and the backend that uses it."""

    name: str
    backend: SQLAlchemyResultBackend[Any]
    connection: asyncpg.Connection

    async def fill(self, rows: int, *, half_expired: bool = False) -> None:
        """Replaces all rows, and leaves the server as autovacuum and a checkpoint would."""
        await self.connection.execute(f"TRUNCATE {self.name}")
        await self.store("template")
        copies = copy_template(self.backend.models, rows, half_expired=half_expired)
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's, bare
        compiled = copies.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
        await self.connection.execute(str(compiled))
        await self.connection.execute(f"VACUUM (ANALYZE) {self.name}")
        await self.connection.execute("CHECKPOINT")

    def load(self, name: str, rows: int) -> tuple[Call, Iterator[str]]:
        """What is called, and with which task ids."""
        if name == RANDOM_IDS:
            return self.store, new_ids()
        if name == IDS_IN_ORDER:
            return self.store, (f"{time.time_ns() // 10**6:012x}7{each[13:]}" for each in new_ids())
        # The ids that copy_template() has made.
        positions = (str(random.randrange(rows) + 1) for _ in itertools.count())  # noqa: S311 - no secret
        ids = (hashlib.md5(each.encode(), usedforsecurity=False).hexdigest() for each in positions)
        return getattr(self.backend, name.strip("`")), ids

    async def store(self, task_id: str) -> None:
        await self.backend.set_result(task_id, RESULT)


def copy_template(models: Models, rows: int, *, half_expired: bool) -> Insert:
    """So many copies of the table's only row, which set_result has written."""
    template = models.results_table
    position = func.generate_series(1, rows).column_valued("position")
    values: dict[str, Any] = {column.name: column for column in template.c}
    values["task_id"] = func.md5(cast(position, Text))
    if half_expired:
        day = case((func.mod(position, 2) == 0, timedelta(days=-1)), else_=timedelta(days=1))
        # Every row expires at another time.
        values["expires_at"] = func.now() + day + cast(position, Float) * timedelta(milliseconds=1)
    return insert(template).from_select(list(values), select(*values.values()))


async def measure_calls(few: Results, many: Results, plan: Plan) -> Rows:
    await many.fill(plan.rows)
    rows = []
    for call, callers in itertools.product(CALLS, CALLERS):
        print(f"{plan.rows:,} rows: {call}, {callers} at once", flush=True)
        samples: dict[str, list[Sample]] = {few.name: [], many.name: []}
        for round_number in range(plan.rounds + 1):
            await few.fill(FEW_ROWS)
            for results, count in random.sample([(few, FEW_ROWS), (many, plan.rows)], 2):
                sample = await measure(*results.load(call, count), callers, plan.seconds)
                if round_number:  # round 0 is to warm up
                    samples[results.name].append(sample)
        small, large = (medians(each) for each in samples.values())
        latencies = number(small.p50_ms), number(large.p50_ms)
        rates = number(small.per_second), number(large.per_second)
        ratio = f"{number(large.per_second / small.per_second)}x"
        rows.append([call, f"{callers:,}", *latencies, *rates, ratio])
    return rows


async def measure_pruning(many: Results, plan: Plan) -> tuple[str, Rows]:
    """What pruning did, and the latency of set_result meanwhile."""
    print(f"{plan.rows:,} rows: pruning", flush=True)
    await many.fill(plan.rows, half_expired=True)
    latencies: dict[str, list[float]] = {"rests": [], "works": []}
    pruning, is_complete, deleted, seconds = "rests", False, 0, 0.0

    async def write() -> None:
        for task_id in itertools.takewhile(lambda _: not is_complete, new_ids()):
            while_it, before = pruning, time.perf_counter()
            await many.store(task_id)
            latencies[while_it].append((time.perf_counter() - before) * 1000)
            await asyncio.sleep(PAUSE)

    writers = [asyncio.create_task(write()) for _ in range(WRITERS)]
    while not is_complete:
        await asyncio.sleep(plan.window)
        pruning, before = "works", time.perf_counter()
        pruned = await many.backend.prune(time_budget=plan.window)
        pruning, is_complete = "rests", pruned.is_complete
        deleted, seconds = deleted + pruned.results, seconds + time.perf_counter() - before
    await asyncio.gather(*writers)
    assert deleted == plan.rows // 2
    summary = f"It deleted {deleted:,} rows in {seconds:.1f} s: {deleted / seconds:,.0f} a second."
    return summary, [[it, *map(number, percentiles(each))] for it, each in latencies.items()]


async def measure_all(dsn: str, plan: Plan) -> str:
    """The report."""
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(connected(dsn))
        environment = await read_environment(servers)
        # Before there are large tables, which would keep autovacuum at work.
        rounds, seconds = plan.process_rounds, plan.process_seconds
        costs = await measure_processes(servers.postgres, rounds, seconds)
        both = []
        for name in ("few", "many"):
            contender = replace(OURS, table=name)
            backend = await stack.enter_async_context(started(contender, dsn, "large"))
            assert isinstance(backend, SQLAlchemyResultBackend)
            both.append(Results(name, backend, servers.postgres.connection))
        few, many = both
        calls = await measure_calls(few, many, plan)
        pruning, latencies = await measure_pruning(many, plan)
    parts = [report(plan, environment, calls, pruning, latencies)]
    parts.append(processes_report(costs, rounds, seconds))
    return "\n".join(parts)


def report(plan: Plan, environment: Rows, calls: Rows, pruning: str, latencies: Rows) -> str:
    latency = ["few rows: p50 ms:", "many rows: p50 ms:"]
    rates = ["few rows: calls/s:", "many rows: calls/s:", "many / few:"]
    return f"""# {plan.rows:,} results

`make bench-large` wrote this report. The rows are copies of a result with a value of 200 B, each
with its own task id.

{table(["", ""], environment)}

## Calls

Each call was measured, in turns, on a table that began with {plan.rows:,} rows and on one that
began each round with {FEW_ROWS:,}. The figures are medians of {plan.rounds} rounds. A checkpoint
ran before each round. After a checkpoint, the first change of a page writes the whole page to the
WAL. In a large table nearly every random id changes another page, while ids in order (UUIDs of
version 7) share pages. Reads are of random rows.

{table(["call", "callers:", *latency, *rates], calls)}

## Pruning

`prune()` ran on {plan.rows:,} rows, half of which had expired. Meanwhile {WRITERS} callers stored
results, each {PAUSE * 1000:g} ms after its previous one. In turns, `prune()` worked for
{plan.window:g} s and rested for {plan.window:g} s. {pruning}

{table(["`set_result` while it", "p50 ms:", "p99 ms:"], latencies)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large")
    parser.add_argument("--quick", action="store_true", help="a short look, at fewer rows")
    is_quick = parser.parse_args().quick
    settings = DURABLE | {"max_connections": str(MAX_CONNECTIONS)}
    with postgres(settings=settings) as server:
        markdown = asyncio.run(measure_all(server.dsn, QUICK if is_quick else Plan()))
    print(f"\n{markdown}")
    directory = DIRECTORY.parent / "build" / "bench" if is_quick else DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "LARGE.md").write_text(markdown, "utf-8")


if __name__ == "__main__":
    main()
