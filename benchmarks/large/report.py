"""LARGE.md and large.json."""

import json
from dataclasses import asdict, dataclass

from benchmarks.environment import Environment
from benchmarks.large.calls import ANY, Calls
from benchmarks.large.plan import LargePlan
from benchmarks.large.pruning import PAUSE, WRITERS, Latency, PruningCost
from benchmarks.large.tables import PAYLOAD_BYTES, SECONDS_BETWEEN, Size
from benchmarks.markdown import number, table
from benchmarks.report import environment_table, rounded, targets_table
from benchmarks.targets import Target


@dataclass(frozen=True, slots=True)
class LargeResults:
    """All figures of a run; load_averages are those of a minute, at its begin and end."""

    environment: Environment
    load_averages: tuple[float, float]
    plan: LargePlan
    calls: list[Calls]
    sizes: list[Size]
    pruning: PruningCost


def targets(results: LargeResults) -> list[Target]:
    pruning = results.pruning
    return [
        *[
            Target(
                f"{each.operation} ({each.results}), {_callers(each)}, shared_buffers="
                f"{each.shared_buffers}: p50 on {results.plan.rows:,} rows beside few",
                "at most",
                1.5,
                each.ratio,
            )
            for each in results.calls
            if each.results != ANY
        ],
        Target(
            "set_result while prune() works: p99 beside that while it rests",
            "at most",
            2,
            pruning.at_work.p99_ms / pruning.resting.p99_ms,
        ),
    ]


def as_json(results: LargeResults) -> str:
    document = asdict(results) | {
        "targets": [asdict(each) | {"is_met": each.is_met} for each in targets(results)]
    }
    return json.dumps(rounded(document), indent=2) + "\n"


def as_markdown(results: LargeResults) -> str:
    before, after = results.load_averages
    sections = [
        f"# {results.plan.rows:,} results",
        "Made by `make bench-large`. One statement writes all rows of a table, with the values "
        f"that `set_result` writes for a payload of {PAYLOAD_BYTES} B, one for each "
        f"{SECONDS_BETWEEN * 1000:g} ms; their task ids are in no order, as UUIDs are. After "
        "that comes `VACUUM (ANALYZE)`, as autovacuum would run it, and a checkpoint.",
        environment_table(results.environment),
        f"The load average was {number(before)} before the run and {number(after)} after it; "
        "the run itself makes about 2.",
        "## Targets",
        targets_table(targets(results)),
        "## Calls",
        _calls(results),
        "## Bytes a row",
        _sizes(results),
        "## Pruning",
        _pruning(results.pruning, results.plan),
    ]
    return "\n\n".join(sections) + "\n"


def _calls(results: LargeResults) -> str:
    plan = results.plan
    rows = [
        [
            each.shared_buffers,
            each.operation,
            each.results,
            f"{each.callers:,}",
            *(number(each.small_p50_ms), number(each.large_p50_ms), f"{number(each.ratio)}x"),
            *(number(each.small_per_second), number(each.large_per_second)),
        ]
        for each in results.calls
    ]
    headers = ["shared_buffers", "operation", "results", "callers:", "few: p50 ms:"]
    return (
        f"On a table with {plan.rows:,} rows beside one with few, by turns: `set_result` begins "
        f"with an empty table each time, and the others find {plan.few_rows:,} rows there. "
        f"{plan.rounds} rounds; figures are medians, ratios those of the rounds' ratios.\n\n"
        "Of the many rows, reads are about either recent results, which PostgreSQL has in its "
        "memory still, or any, each from a page that nobody else asks for. Those of any are not "
        "held to a target: the table takes more than 128 MB, PostgreSQL's default for "
        "`shared_buffers`, and what is measured is how it reads pages. 1 GB holds the table.\n\n"
        "The first change of a page after a checkpoint goes to the WAL as the whole page, up to "
        "8 kB: PostgreSQL's protection from torn pages. Of many pages at random most results find "
        "such a one at first, until all have been written once. *New* results are stored after "
        "the one checkpoint that follows the filling of the table, and no other comes in the "
        "meantime: those of 1 caller, which come first, still find such pages, those of 100 "
        "callers only in their first rounds. *After a checkpoint* there is one before each "
        "round. *In order* the task ids begin with the time, as those of UUID's version 7, and "
        "share pages.\n\n"
        + table([*headers, "many: p50 ms:", "ratio:", "few: calls/s:", "many: calls/s:"], rows)
    )


def _sizes(results: LargeResults) -> str:
    rows = [
        [
            each.variant,
            *map(_bytes, (each.heap, each.primary_key, each.indexes, each.toast, each.total)),
        ]
        for each in results.sizes
    ]
    headers = ["with", "heap:", "primary key:", "other indexes:", "TOAST:", "total:"]
    return (
        "Every row has an expiry of its own here. Those that `set_result` writes in one batch "
        "share theirs, and so their index takes less under load.\n\n" + table(headers, rows)
    )


def _bytes(value: float) -> str:
    return f"{value:.1f}"


def _pruning(cost: PruningCost, plan: LargePlan) -> str:
    figures = table(
        ["", ":"],
        [
            ["rows deleted", f"{cost.deleted:,}"],
            ["seconds in all", number(cost.seconds)],
            ["rows/s", number(cost.deleted / cost.seconds)],
            ["statements", f"{cost.statements:,}"],
            ["a statement, p50 ms", number(cost.statement_p50_ms)],
            ["a statement, max ms", number(cost.statement_max_ms)],
        ],
    )
    rows = [
        _latency("it rests", cost.resting),
        _latency("it works", cost.at_work),
    ]
    return (
        f"`prune()` on {plan.rows:,} rows with TTL and metadata, of which every second one has "
        f"expired, while {WRITERS} callers store results, each {PAUSE * 1000:g} ms after its last. "
        f"It works for {plan.window:g} s and rests for as long, by turns, so that both are "
        f"measured under the same load.\n\n{figures}\n\n"
        + table(["set_result while", "calls:", "p50 ms:", "p99 ms:"], rows)
    )


def _latency(name: str, latency: Latency) -> list[str]:
    return [name, f"{latency.calls:,}", number(latency.p50_ms), number(latency.p99_ms)]


def _callers(calls: Calls) -> str:
    return f"{calls.callers:,} caller{'s' if calls.callers > 1 else ''}"
