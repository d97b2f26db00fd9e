"""`python -m benchmarks [--quick]`: measures, prints, and writes the reports.

The full run replaces results.json, RESULTS.md and the charts beside this file and the table in the
README; a quick one leaves its own in build/bench/.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks import chart, environment, report, waiters
from benchmarks.footprint import measure_connections, measure_memory
from benchmarks.markdown import MarkersMissingError, check_markers, replace_marked
from benchmarks.overhead import measure_overhead
from benchmarks.plan import FULL, QUICK, Plan
from benchmarks.readme import readme_table
from benchmarks.results import Results
from benchmarks.throughput import measure_throughput
from benchmarks.waiters import measure_waiters
from benchmarks.waiting import measure_waiting
from taskiq_sa_pg.embedded import postgres

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="a short look at everything")
    is_quick = parser.parse_args().quick
    if not is_quick:
        check_markers(README, "benchmark")
    results = measure(QUICK if is_quick else FULL)
    directory = ROOT / "build" / "bench" if is_quick else Path(__file__).parent
    write(results, directory)
    if not is_quick:
        replace_marked(README, "benchmark", readme_table(results))


def measure(plan: Plan) -> Results:
    with (
        postgres(settings=environment.SETTINGS) as server,
        postgres(settings=waiters.SETTINGS) as counting_server,
    ):
        return asyncio.run(_measure(server.dsn, counting_server.dsn, plan))


async def _measure(dsn: str, counting_dsn: str, plan: Plan) -> Results:
    return Results(
        environment=await environment.read_environment(dsn),
        plan=plan,
        throughput=await measure_throughput(dsn, plan),
        waiting=await measure_waiting(dsn, plan),
        connections=await measure_connections(dsn),
        memory=await measure_memory(dsn, plan),
        overhead=await measure_overhead(dsn, plan),
        waiters=await measure_waiters(counting_dsn, plan),
    )


def write(results: Results, directory: Path) -> None:
    markdown = report.as_markdown(results)
    print(f"\n{markdown}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(report.as_json(results), "utf-8")
    (directory / "RESULTS.md").write_text(markdown, "utf-8")
    chart.draw(results, directory)


if __name__ == "__main__":
    try:
        main()
    except MarkersMissingError as exc:
        sys.exit(str(exc))
