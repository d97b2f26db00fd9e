"""RESULTS.md, and the table in the README."""

from collections.abc import Callable, Iterable
from typing import Final, Literal

from benchmarks.connections import CALLERS
from benchmarks.contenders import OURS, PEER, REDIS_PEER, Contender
from benchmarks.markdown import number, size, table
from benchmarks.measure import Sample
from benchmarks.results import Results, targets
from benchmarks.throughput import OPERATIONS, SCENARIOS, TASKS, Scenario, compare
from benchmarks.waiters import WAITERS
from benchmarks.waiting import BACKEND_WAITS, TASK_WAITS, Way
from benchmarks.worker import PROCESSES, WAITED_WITH, InWorker
from benchmarks.worker import TASKS as TASKS_SENT

_REDIS: Final = """Redis keeps all results in memory: its append-only file is off, as by default,
and snapshots are off, because they would disturb the others. A crash loses the results."""
_NO_REDIS: Final = f"{REDIS_PEER.name} was not measured, because redis-server was not installed."


def as_markdown(results: Results) -> str:
    lone = [Scenario(operation, 1) for operation in OPERATIONS]
    return f"""# Benchmark results

`make bench` wrote this report. All backends ran with their default arguments, on one machine, in
one run. They took turns in each of {results.plan.rounds} rounds. Every figure is the median of the
rounds; a ratio is one of two medians. Callers are coroutines of one process. Each calls again when
its last call has returned. `set_result` starts with an empty table and stores a new task
with each call; `is_result_ready` and `get_result` read such results, and `set_progress` updates the
progress of {TASKS:,} tasks.

Noise: {PEER.name} was measured twice, as two backends with separate tables. The noise in
the row of a ratio is the difference between these two. A difference between other backends that is
not larger means nothing.

PostgreSQL has its default settings: a stored result survives a crash.
{_REDIS if REDIS_PEER in results.contenders else _NO_REDIS}
Servers and clients run on the same machine and are connected by Unix sockets.

{table(["", ""], results.environment)}

## Targets

{_targets(results)}

{_in_worker(results)}## Calls per second

{_compare(results, SCENARIOS, "per_second", lambda sample: number(sample.per_second))}

## Latency of one caller

p50 / p99 in ms; ratio and noise are those of p50.

{_compare(results, lone, "p50_ms", lambda sample: _pair(sample.p50_ms, sample.p99_ms))}

## Waiting for a 10 ms task

A second process runs a task that takes 10 ms, and stores its result. p50 / p99 in ms: from sending
the task to receiving the result, and from the return of `set_result` in the second process to
receiving the result. `task.wait_result()` is taskiq's own method. It polls every 200 ms, its
default, and finds such a result with its second poll.

{_waiting(results)}

## {WAITERS:,} waiters on unfinished tasks

Statements that the server executed for {WAITERS:,} waiters in one process, in
{results.plan.window:g} s. All are counted, including those that begin or end a transaction or reset
a connection. For Redis, commands are counted.

{_waiters(results)}

## Connections

The maximum number of connections of one process.

{_connections(results)}
"""


def readme_table(results: Results) -> str:
    def row(name: str, figure: Callable[[Contender], float]) -> list[str]:
        return [name, *(number(figure(each)) for each in results.contenders)]

    def best_way(contender: Contender) -> Way:
        return Way(contender, BACKEND_WAITS if contender == OURS else TASK_WAITS)

    in_worker = results.in_worker
    stored = Scenario("set_result", 100)
    executed = [] if in_worker is None else [_executed_row(results, in_worker)]
    rows = [
        *executed,
        row(
            "`set_result`, 100 callers: calls/s",
            lambda each: results.throughput[stored, each].per_second,
        ),
        row(
            "10 ms task: result after, p50 ms",
            lambda each: results.waiting[best_way(each)].whole[0],
        ),
    ]
    return table(["", *_names(results)], rows)


def _executed_row(results: Results, in_worker: InWorker) -> list[str]:
    processes = PROCESSES[-1]
    found = [in_worker.executed.get((processes, each)) for each in results.contenders]
    rates = ["" if each is None else number(each.per_second) for each in found]
    return [f"{processes} worker processes: tasks/s", *rates]


def _in_worker(results: Results) -> str:
    in_worker = results.in_worker
    if in_worker is None:
        return ""
    contenders = list(dict.fromkeys(contender for _, contender in in_worker.executed))
    rows = [
        [
            each.name,
            *(number(in_worker.executed[count, each].per_second) for count in PROCESSES),
            number(in_worker.executed[PROCESSES[-1], each].per_statement) if each.is_ours else "",
        ]
        for each in contenders
    ]
    awaited = [
        [way.contender.name, f"`{WAITED_WITH[way.method]}`", number(rate.per_second)]
        for way, rate in in_worker.awaited.items()
    ]
    processes = [f"{count} process{'es' if count > 1 else ''}:" for count in PROCESSES]
    return f"""## Inside a worker

Tasks per second of real `taskiq worker` processes. They empty a queue in Redis, which was filled
before with {TASKS_SENT:,} tasks that do nothing; medians of {results.plan.worker_rounds} rounds.
Results a statement are those of {PROCESSES[-1]} processes.

{table(["result backend", *processes, "results a statement:"], rows)}

A client sends {TASKS_SENT:,} tasks to {PROCESSES[-1]} worker processes and waits for all results.
Tasks per second, from sending the first task to receiving the last result:

{table(["result backend", "waiting in", "tasks/s:"], awaited)}

"""


def _targets(results: Results) -> str:
    rows = [
        [
            target.figure,
            target.bound,
            f"{number(target.measured)}{target.unit}",
            "" if target.noise is None else f"{target.noise:.0%}",
            "met" if target.is_met else "**missed**",
        ]
        for target in targets(results)
    ]
    return table(["figure", "target", "measured:", "noise:", ""], rows)


def _compare(
    results: Results,
    scenarios: Iterable[Scenario],
    figure: Literal["per_second", "p50_ms"],
    show: Callable[[Sample], str],
) -> str:
    rows = []
    for scenario in scenarios:
        ratio, noise = compare(results.throughput, scenario, figure)
        call = f"`{scenario.operation}`, {size(scenario.payload_bytes)}"
        samples = (results.throughput[scenario, each] for each in results.contenders)
        cells = [call, f"{scenario.callers:,}", *map(show, samples)]
        rows.append([*cells, f"{number(ratio)}x", f"{noise:.0%}"])
    ratio_name = f"{OURS.name} / {PEER.name}:"
    return table(["call", "callers:", *_names(results), ratio_name, "noise:"], rows)


def _waiting(results: Results) -> str:
    rows = [
        [way.contender.name, f"`{way.method}`", _pair(*waits.whole), _pair(*waits.after_storing)]
        for way, waits in results.waiting.items()
    ]
    return table(["backend", "waiting in", "from sending:", "from storing:"], rows)


def _waiters(results: Results) -> str:
    rows = [
        [way.contender.name, f"`{way.method}`", number(cost.statements_per_second)]
        for way, cost in results.waiters.items()
    ]
    return table(["backend", "waiting in", "statements/s:"], rows)


def _connections(results: Results) -> str:
    rows = [[each.name, *map(str, results.most_connections(each))] for each in results.contenders]
    headers = [f"{CALLERS:,} callers of `set_result`:", f"{WAITERS:,} waiters:"]
    return table(["backend", *headers], rows)


def _names(results: Results) -> list[str]:
    return [f"{contender.name}:" for contender in results.contenders]


def _pair(p50: float, p99: float) -> str:
    return f"{number(p50)} / {number(p99)}"
