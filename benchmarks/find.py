"""`python -m benchmarks.find [--quick]`: the server's time for a page of a million results.

The full run replaces FIND.md beside this file; a quick one leaves its own in build/bench/. The exit
status is 1 if a page takes longer than its bound.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg
from sqlalchemy import event

from benchmarks.contenders import OURS, started
from benchmarks.environment import read_environment
from benchmarks.markdown import number, table
from benchmarks.servers import DURABLE, connected
from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.embedded import postgres
from taskiq_sa_pg.statements import select_buckets

DIRECTORY: Final = Path(__file__).parent
DAYS: Final = 30
PAGE_MS: Final = 50.0  # the bound of a page
OVERVIEW_MS: Final = 300.0  # and of the dashboard's overview

Backend = SQLAlchemyResultBackend[Any]

# What find() reads is here; the value, which it does not read, is as large as that of LARGE.md.
FILL: Final = """
    INSERT INTO {table} (
        task_id, is_err, return_value, error_type, traceback, execution_time, labels, task_name,
        worker, attempt, finished_at, args, kwargs, queued_at, started_at
    )
    SELECT
        md5(n::text), is_err, decode(repeat('ab', 200), 'hex'),
        CASE WHEN is_err THEN 'ValueError' END,
        CASE WHEN is_err THEN repeat('  File "task.py", line 1, in task' || chr(10), 20) END,
        n % 1000 / 1000.0, jsonb_build_object('user', n % 10000, 'tenant', n % 100),
        'task ' || n % 20, 'worker ' || n % 4, 0, at, jsonb_build_array(n),
        jsonb_build_object('order_id', n), at - interval '2 seconds', at - interval '1 second'
    FROM (
        SELECT
            n, n % 100 = 7 AS is_err,
            now() - interval '1 day' * {days} * ({rows} - n)::float8 / {rows} AS at
        FROM generate_series(1, {rows}) AS n
    ) AS numbers
"""


class Plan(NamedTuple):
    """How much is measured."""

    rows: int = 1_000_000
    rounds: int = 5


QUICK: Final = Plan(rows=50_000, rounds=2)


class Question(NamedTuple):
    """What is asked of a backend, and in how many milliseconds of the server's it must be told.

    None is no bound: it is there to be known.
    """

    name: str
    ask: Callable[[Backend], Awaitable[Any]]
    bound: float | None = PAGE_MS


async def twentieth_page(backend: Backend) -> None:
    page = await backend.find()
    for _ in range(19):
        page = await backend.find(after=page.next)


def page_of(**arguments: Any) -> Callable[[Backend], Awaitable[Any]]:
    return lambda backend: backend.find(**arguments)


async def page_in_the_middle(backend: Backend) -> None:
    middle = datetime.now(UTC) - timedelta(days=DAYS / 2)
    await backend.find(after=f"{middle:%Y-%m-%dT%H:%M:%S.%f}Z_x")


DAY: Final = timedelta(days=1)
RARE: Final = "by a label of one in 10,000"
PAGES: Final = (
    Question("the first", page_of()),
    Question("the second to twentieth, each", twentieth_page),
    Question("one in the middle", page_in_the_middle),
    Question("by outcome, one in 100", page_of(outcome="failed")),
    Question("by name, one in 20", page_of(name="task 3")),
    Question("by label, one in 100", page_of(label={"tenant": "42"})),
    Question("by an argument, of the last day", page_of(argument={"order_id": 1}, window=DAY)),
    Question(f"{RARE}, of the last day", page_of(label={"user": "42"}, window=DAY)),
    Question(f"{RARE}, of all", page_of(label={"user": "42"}), None),
)


def overview_of(length: timedelta, width: timedelta) -> Callable[[Backend], Awaitable[Any]]:
    """The statement behind the charts of the dashboard's first page."""

    async def ask(backend: Backend) -> None:
        until = datetime.now(UTC)
        parameters = {"since": until - length, "until": until, "width": width}
        async with backend.runtime.database.engine.connect() as connection:
            await connection.execute(select_buckets(backend.models), parameters)

    return ask


OVERVIEW: Final = (
    Question("the last hour", overview_of(DAY / 24, DAY / 24 / 60), OVERVIEW_MS),
    Question("the last 24 hours", overview_of(DAY, DAY / 72), OVERVIEW_MS),
    Question("the last 7 days", overview_of(7 * DAY, DAY / 12), None),
)

WITH_GIN: Final = Question(f"{RARE}, of all, with a GIN index", page_of(label={"user": "42"}))


class Figure(NamedTuple):
    """The medians of some rounds."""

    question: Question
    statements: float
    milliseconds: float

    @property
    def is_late(self) -> bool:
        bound = self.question.bound
        return bound is not None and self.milliseconds > bound

    @property
    def cells(self) -> list[str]:
        bound = self.question.bound
        limit = "" if bound is None else number(bound)
        return [self.question.name, number(self.statements), number(self.milliseconds), limit]


@contextmanager
def statements_of(backend: Backend) -> Iterator[list[tuple[str, Any]]]:
    """Collects the statements that the backend runs, with their parameters."""
    found: list[tuple[str, Any]] = []
    engine = backend.runtime.database.engine.sync_engine

    def note(_: Any, __: Any, text: str, parameters: Any, *___: Any) -> None:
        found.append((text, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def server_ms(connection: asyncpg.Connection, text: str, parameters: Any) -> float:
    """For how long the server plans and executes a statement."""
    explain = f"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY) {text}"
    lines = [row[0] for row in await connection.fetch(explain, *parameters)]
    times = [line.split()[2] for line in lines if line.startswith(("Planning T", "Execution T"))]
    assert len(times) == 2
    return sum(map(float, times))


async def measure(
    backend: Backend, connection: asyncpg.Connection, question: Question, rounds: int
) -> Figure:
    print(question.name, flush=True)
    counts, totals = [], []
    calls = 20 if question.ask is twentieth_page else 1
    for round_number in range(rounds + 1):
        with statements_of(backend) as statements:
            await question.ask(backend)
        total = sum([await server_ms(connection, *each) for each in statements])
        if round_number:  # round 0 is to warm up
            counts.append(len(statements) / calls)
            totals.append(total / calls)
    return Figure(question, statistics.median(counts), statistics.median(totals))


async def fill(connection: asyncpg.Connection, name: str, rows: int) -> None:
    """So many rows, and the table as autovacuum leaves it."""
    await connection.execute(f"TRUNCATE {name}")
    await connection.execute(FILL.format(table=name, rows=rows, days=DAYS))
    await connection.execute(f"VACUUM (ANALYZE) {name}")
    await connection.execute("CHECKPOINT")


async def measure_all(dsn: str, plan: Plan) -> tuple[str, bool]:
    """The report, and whether all bounds are kept."""
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(connected(dsn))
        environment = await read_environment(servers)
        backend = await stack.enter_async_context(started(OURS, dsn, "find"))
        assert isinstance(backend, SQLAlchemyResultBackend)
        connection, name = servers.postgres.connection, OURS.table
        await fill(connection, name, plan.rows)
        pages, overview = [
            [await measure(backend, connection, each, plan.rounds) for each in questions]
            for questions in (PAGES, OVERVIEW)
        ]
        # As docs/how-to/find-results.md has it.
        await connection.execute(f"CREATE INDEX ON {name} USING gin (labels jsonb_path_ops)")
        pages.append(await measure(backend, connection, WITH_GIN, plan.rounds))
    is_kept = not any(figure.is_late for figure in (*pages, *overview))
    return report(plan, environment, pages, overview), is_kept


def report(
    plan: Plan, environment: list[list[str]], pages: list[Figure], overview: list[Figure]
) -> str:
    headers = ["statements:", "server's ms:", "bound:"]
    others = ""
    if overview:
        rows = [each.cells for each in overview]
        others = f"\n## The dashboard's overview\n\n{table(['query', *headers], rows)}\n"
    return f"""# Pages of {plan.rows:,} results

`make bench-find` wrote this report. The rows finished at regular intervals in the last {DAYS} days;
each has a value of 200 B, labels, arguments and times. A page has 50 tasks. The server's time is
the sum of the planning and execution times that `EXPLAIN (ANALYZE)` reports for each statement of a
call. The figures are medians of {plan.rounds} rounds.

{table(["", ""], environment)}

## find()

{table(["page", *headers], [each.cells for each in pages])}

The page without a bound reads most of the table, because only
{max(plan.rows // 10_000, 1):,} rows have such a label.
{others}"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.find")
    parser.add_argument("--quick", action="store_true", help="a short look, at fewer rows")
    is_quick = parser.parse_args().quick
    with postgres(settings=DURABLE) as server:
        plan = QUICK if is_quick else Plan()
        markdown, is_kept = asyncio.run(measure_all(server.dsn, plan))
    print(f"\n{markdown}")
    directory = DIRECTORY.parent / "build" / "bench" if is_quick else DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "FIND.md").write_text(markdown, "utf-8")
    if not is_kept:
        sys.exit("a page takes longer than its bound")


if __name__ == "__main__":
    main()
