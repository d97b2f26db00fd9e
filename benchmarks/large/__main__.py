"""`python -m benchmarks.large [--quick]`: measures, prints, and writes the report.

The full run replaces LARGE.md and large.json in benchmarks/; a quick one leaves its own in
build/bench/.
"""

import argparse
import asyncio
import os
from pathlib import Path

from benchmarks import environment
from benchmarks.large.calls import Calls, measure_calls
from benchmarks.large.plan import FULL, QUICK, LargePlan
from benchmarks.large.pruning import measure_pruning
from benchmarks.large.report import LargeResults, as_json, as_markdown
from benchmarks.large.tables import measure_sizes, opened
from taskiq_sa_pg.embedded import postgres

# PostgreSQL's default, and what holds all of a million rows.
SHARED_BUFFERS = ("128MB", "1GB")

DIRECTORY = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large")
    parser.add_argument("--quick", action="store_true", help="a short look, at fewer rows")
    is_quick = parser.parse_args().quick
    results = measure(QUICK if is_quick else FULL)
    write(results, DIRECTORY.parent / "build" / "bench" if is_quick else DIRECTORY)


def measure(plan: LargePlan) -> LargeResults:
    load_before = os.getloadavg()[0]
    calls = []
    for shared_buffers in SHARED_BUFFERS:
        settings = {**environment.SETTINGS, "shared_buffers": shared_buffers}
        with postgres(settings=settings) as server:
            calls += asyncio.run(_measure_calls(server.dsn, plan))
    with postgres(settings=environment.SETTINGS) as server:
        return asyncio.run(_measure_rest(server.dsn, plan, load_before, calls))


async def _measure_calls(dsn: str, plan: LargePlan) -> list[Calls]:
    async with opened(dsn) as tables:
        return await measure_calls(tables, plan)


async def _measure_rest(
    dsn: str, plan: LargePlan, load_before: float, calls: list[Calls]
) -> LargeResults:
    async with opened(dsn) as tables:
        pruning = await measure_pruning(tables, plan)
        sizes = await measure_sizes(tables, plan.rows)
    return LargeResults(
        environment=await environment.read_environment(dsn),
        load_averages=(load_before, os.getloadavg()[0]),
        plan=plan,
        calls=calls,
        sizes=sizes,
        pruning=pruning,
    )


def write(results: LargeResults, directory: Path) -> None:
    markdown = as_markdown(results)
    print(f"\n{markdown}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "LARGE.md").write_text(markdown, "utf-8")
    (directory / "large.json").write_text(as_json(results), "utf-8")


if __name__ == "__main__":
    main()
