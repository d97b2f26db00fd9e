"""`python -m benchmarks.large [--quick]`: measures, prints, and writes the report.

The full run replaces LARGE.md and large.json in benchmarks/; a quick one leaves its own in
build/bench/.
"""

import argparse
import asyncio
import os
from pathlib import Path

from benchmarks import environment
from benchmarks.large.calls import measure_calls
from benchmarks.large.plan import FULL, QUICK, LargePlan
from benchmarks.large.pruning import measure_pruning
from benchmarks.large.report import LargeResults, as_json, as_markdown
from benchmarks.large.tables import measure_sizes, opened
from taskiq_sa_pg.embedded import postgres

DIRECTORY = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large")
    parser.add_argument("--quick", action="store_true", help="a short look, at fewer rows")
    is_quick = parser.parse_args().quick
    with postgres(settings=environment.SETTINGS) as server:
        results = asyncio.run(_measure(server.dsn, QUICK if is_quick else FULL))
    write(results, DIRECTORY.parent / "build" / "bench" if is_quick else DIRECTORY)


async def _measure(dsn: str, plan: LargePlan) -> LargeResults:
    load_before = os.getloadavg()[0]
    async with opened(dsn) as tables:
        calls = await measure_calls(tables, plan)
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
