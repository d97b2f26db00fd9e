"""The complete report: RESULTS.md and results.json."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from benchmarks.contenders import ASYNCPG_PEER, OURS
from benchmarks.environment import Environment
from benchmarks.markdown import number, size, table
from benchmarks.overhead import CALLERS as OVERHEAD_CALLERS
from benchmarks.overhead import Overhead
from benchmarks.plan import Plan
from benchmarks.results import Results
from benchmarks.targets import Target, targets
from benchmarks.throughput import OPERATIONS, Throughput
from benchmarks.waiters import WAITERS

_CPU_CALLERS = 100


def as_json(results: Results) -> str:
    document = asdict(results) | {
        "targets": [asdict(each) | {"is_met": each.is_met} for each in targets(results)]
    }
    return json.dumps(rounded(document), indent=2) + "\n"


def as_markdown(results: Results) -> str:
    sections = [
        "# Benchmark results",
        _introduction(results),
        environment_table(results.environment),
        "## Targets",
        targets_table(targets(results)),
        "## Calls per second",
        *_throughput(results),
        "## CPU time",
        _cpu(results),
        "## What TTL and metadata cost",
        overhead_section(results.overhead, results.plan),
        "## Waiting for a 10 ms task in another process",
        _waiting(results),
        f"## {WAITERS:,} waiters on unfinished tasks",
        _waiters(results),
        "## Connections",
        _connections(results),
        f"## Memory of {OURS.name}",
        _memory(results),
    ]
    return "\n\n".join(sections) + "\n"


def environment_table(environment: Environment) -> str:
    return table(
        ["", ""],
        [
            ["date", environment.measured_on],
            ["system", f"{environment.system}, {environment.cpus} CPUs"],
            ["PostgreSQL", f"{environment.postgresql}, {_pairs(environment.settings, '=')}"],
            ["Python", environment.python],
            ["packages", _pairs(environment.packages, " ")],
        ],
    )


def targets_table(all_targets: Iterable[Target]) -> str:
    rows = [
        [
            each.figure,
            f"{each.bound} {each.limit:g} {each.unit}",
            f"{_precise(each.measured)} {each.unit}",
            "ok" if each.is_met else "MISSED",
        ]
        for each in all_targets
    ]
    return table(["figure", "target", "measured:", ""], rows)


def _introduction(results: Results) -> str:
    return (
        "Made by `make bench`. All contenders, with their default arguments, took turns on one "
        "server in one run, `set_result` beginning with empty tables each time; "
        f"each figure is the median of {results.plan.rounds} rounds, and ratios "
        "are those of medians. Callers are coroutines of one process, each of which calls again "
        "as soon as its last call has returned. The floor is bare asyncpg: the same database work "
        "as `set_result`, with values that are encoded already; its batches send all twelve "
        "columns, on two connections."
    )


def _throughput(results: Results) -> list[str]:
    sections = []
    for operation in OPERATIONS:
        figures = [each for each in results.throughput if each.operation == operation]
        headers = ["payload", "callers:", "contender", "calls/s:", "p50 ms:", "p99 ms:"]
        rows = [_throughput_row(results, each) for each in figures]
        beside = f"beside {ASYNCPG_PEER.name}:"
        sections += [f"### {operation}", table([*headers, beside], rows)]
    return [*sections, "The p50 and p99 of the batches are those of a whole batch."]


def _throughput_row(results: Results, each: Throughput) -> list[str]:
    peer = results.throughput_of(
        ASYNCPG_PEER.name, each.operation, each.callers, each.payload_bytes
    )
    return [
        size(each.payload_bytes),
        f"{each.callers:,}",
        each.contender,
        number(each.per_second),
        number(each.p50_ms),
        number(each.p99_ms),
        f"{number(each.per_second / peer.per_second)}x",
    ]


def _cpu(results: Results) -> str:
    rows = [
        [
            each.contender,
            size(each.payload_bytes),
            number(each.client_cpu * 1000),
            number(each.server_cpu * 1000),
        ]
        for each in results.throughput
        if (each.operation, each.callers) == ("set_result", _CPU_CALLERS)
    ]
    headers = ["contender", "payload", "client ms:", "server ms:"]
    return f"For 1,000 results through `set_result` with {_CPU_CALLERS} callers.\n\n" + table(
        headers, rows
    )


def overhead_section(overhead: Iterable[Overhead], plan: Plan) -> str:
    rows = [
        [
            each.variant,
            number(each.per_second),
            f"{number(each.ratio)}x",
            " to ".join(map(number, each.quartiles)),
            number(each.client_cpu * 1000),
            number(each.server_cpu * 1000),
        ]
        for each in overhead
    ]
    headers = ["with", "calls/s:", "beside neither:", "quartiles:", "client ms:", "server ms:"]
    return (
        f"`set_result` of {OURS.name}, 200 B, {OVERHEAD_CALLERS} callers, with `result_ttl`, with "
        "what TaskMetadataMiddleware records (task name, worker and two times), and with both. "
        f"{plan.overhead_rounds} short rounds on tables that are emptied before each; a ratio is "
        "the median of those that the rounds have. The CPU time is that of 1,000 results.\n\n"
        + table(headers, rows)
    )


def _waiting(results: Results) -> str:
    rows = [
        [
            each.contender,
            f"`{each.method}()`",
            str(each.waits),
            *(
                f"{number(p50)} / {number(p99)}"
                for p50, p99 in (
                    (each.whole_p50_ms, each.whole_p99_ms),
                    (each.beyond_p50_ms, each.beyond_p99_ms),
                    (each.after_commit_p50_ms, each.after_commit_p99_ms),
                )
            ),
        ]
        for each in results.waiting
    ]
    headers = ["contender", "waiting by", "waits:", "whole:", "beyond the task:", "after commit:"]
    return (
        "p50 / p99 in ms: from sending the task to having its result; the same without the "
        "task's own 10 ms; and from the moment at which the writer's `set_result` returned, "
        "which may be after the waiter has heard of it. `task.wait_result()` is taskiq's, with "
        "its default interval.\n\n" + table(headers, rows)
    )


def _waiters(results: Results) -> str:
    rows = [
        [
            each.contender,
            f"`{each.method}()`",
            number(each.statements_per_second),
            str(each.connections),
        ]
        for each in results.waiters
    ]
    headers = ["contender", "waiting by", "statements/s:", "connections:"]
    return (
        f"Every statement that the server ran in {results.plan.window:g} s counts, those that "
        "begin and end transactions and reset connections included.\n\n" + table(headers, rows)
    )


def _connections(results: Results) -> str:
    rows = [
        [
            each.contender,
            str(each.after_startup),
            str(each.with_callers),
            str(each.after_callers),
        ]
        for each in results.connections
    ]
    return table(["contender", "after startup:", "with 1,000 callers:", "idle again:"], rows)


def _memory(results: Results) -> str:
    rows = [
        [f"{each.results:,}", number(each.rss_mb), str(each.connections)] for each in results.memory
    ]
    return table(["results stored:", "resident MB:", "connections:"], rows)


def _pairs(values: dict[str, str], separator: str) -> str:
    return ", ".join(f"{name}{separator}{value}" for name, value in values.items())


def _precise(value: float) -> str:
    return number(value) if value >= 0.1 else f"{value:.2g}"


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return value
