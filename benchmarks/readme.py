"""The compact table in the README."""

from benchmarks.contenders import CONTENDERS, OURS, Contender
from benchmarks.markdown import number, table
from benchmarks.results import Results
from benchmarks.throughput import OPERATIONS
from benchmarks.waiters import WAITERS
from benchmarks.waiting import BACKEND_WAITS, TASK_WAITS

_CALLERS = (1, 100, 1000)


def readme_table(results: Results) -> str:
    headers = ["", *(f"{contender.name}:" for contender in CONTENDERS)]
    rows = [
        *(_rates(results, operation, callers) for operation in OPERATIONS for callers in _CALLERS),
        ["10 ms task: heard of after, ms", *(_heard_after(results, each) for each in CONTENDERS)],
        [
            f"{WAITERS:,} waiters: statements/s",
            *(_statements(results, each) for each in CONTENDERS),
        ],
        ["most connections", *_connections(results)],
    ]
    return table(headers, rows)


def _rates(results: Results, operation: str, callers: int) -> list[str]:
    figure = f"`{operation}`, {callers:,} caller{'s' if callers > 1 else ''}: calls/s"
    figures = [
        results.throughput_of(contender.name, operation, callers) for contender in CONTENDERS
    ]
    return [figure, *(number(each.per_second) for each in figures)]


def _heard_after(results: Results, contender: Contender) -> str:
    return number(results.waiting_of(contender, _best_method(contender)).whole_p50_ms)


def _statements(results: Results, contender: Contender) -> str:
    return number(results.waiters_of(contender, _best_method(contender)).statements_per_second)


def _connections(results: Results) -> list[str]:
    return [str(each.with_callers) for each in results.connections]


def _best_method(contender: Contender) -> str:
    return BACKEND_WAITS if contender is OURS else TASK_WAITS
