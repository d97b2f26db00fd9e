"""`python -m benchmarks [--quick]`: measures, prints, and writes the report.

The full run replaces RESULTS.md and throughput.png beside this file, and the table in the README.
A quick one leaves its report in build/bench/.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks import chart, report
from benchmarks.connections import measure_connections
from benchmarks.environment import read_environment
from benchmarks.markdown import MarkersMissingError, check_markers, replace_marked
from benchmarks.measure import QUICK, Plan
from benchmarks.results import Results
from benchmarks.servers import COUNTING, DURABLE, connected, redis_server
from benchmarks.throughput import measure_throughput
from benchmarks.waiters import measure_waiters
from benchmarks.waiting import measure_waiting
from benchmarks.worker import measure_worker
from taskiq_sa_pg.embedded import postgres

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="a short look at everything")
    is_quick = parser.parse_args().quick
    if not is_quick:
        check_markers(README, "benchmark")
    results = measure(QUICK if is_quick else Plan())
    write(results, ROOT / "build" / "bench" if is_quick else Path(__file__).parent)
    if not is_quick:
        replace_marked(README, "benchmark", report.readme_table(results))


def measure(plan: Plan) -> Results:
    with (
        postgres(settings=DURABLE) as server,
        postgres(settings=COUNTING) as counting_server,
        redis_server() as redis_url,
    ):
        return asyncio.run(_measure(server.dsn, counting_server.dsn, redis_url, plan))


async def _measure(dsn: str, counting_dsn: str, redis_url: str | None, plan: Plan) -> Results:
    async with connected(dsn, redis_url) as servers:
        environment = await read_environment(servers)
        throughput = await measure_throughput(servers, plan)
        waiting = await measure_waiting(servers, plan)
        connections = await measure_connections(servers)
        in_worker = await measure_worker(servers, plan)
    async with connected(counting_dsn, redis_url) as servers:
        waiters = await measure_waiters(servers, plan)
    contenders = servers.contenders
    return Results(
        plan, contenders, environment, throughput, waiting, connections, waiters, in_worker
    )


def write(results: Results, directory: Path) -> None:
    markdown = report.as_markdown(results)
    print(f"\n{markdown}\n{report.readme_table(results)}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "RESULTS.md").write_text(markdown, "utf-8")
    chart.draw(results, directory / "throughput.png")


if __name__ == "__main__":
    try:
        main()
    except MarkersMissingError as exc:
        sys.exit(str(exc))
