"""What several client processes get out of one server, and what a result costs in CPU time."""

import asyncio
import gc
import itertools
import multiprocessing
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Final, NamedTuple

from benchmarks.contenders import (
    OURS,
    PEER,
    PEER_AGAIN,
    Backend,
    Contender,
    make_payload,
    make_result,
    new_ids,
    started,
)
from benchmarks.markdown import number, table
from benchmarks.measure import Call, call_until
from benchmarks.servers import PostgresServer

PROCESSES: Final = (1, 2, 4)
# Each contender has a pool in each process.
MAX_CONNECTIONS: Final = 200
CALLERS: Final = 100
CALLS: Final = ("set_result", "get_result")

_SUBJECTS: Final = (OURS, PEER, PEER_AGAIN)
_BYTES: Final = 200
# More than there are callers, so that no two of them read the same row at once.
_TASKS: Final = 2000
# So long an order is on its way at most; who gets it later begins later.
_LEAD: Final = 0.03
_WARM_UP_SECONDS: Final = 0.1


class Cost(NamedTuple):
    """One measurement of all processes together, or the medians of several."""

    per_second: float
    client_us: float
    server_us: float

    @property
    def both_us(self) -> float:
        return self.client_us + self.server_us


Costs = dict[tuple[str, int, Contender], Cost]  # by call and number of processes


class _Order(NamedTuple):
    contender: str
    call: str
    start: float  # by time.monotonic(), which is the same in every process
    end: float


class _Done(NamedTuple):
    calls: int
    start: float
    end: float
    cpu_seconds: float


async def measure_processes(server: PostgresServer, rounds: int, seconds: float) -> Costs:
    found: defaultdict[tuple[str, int, Contender], list[Cost]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        # One after the other, as each makes the tables that are not there.
        clients = [
            await stack.enter_async_context(_client(server.address)) for _ in range(PROCESSES[-1])
        ]
        for number_of_round in range(rounds + 1):
            print(f"processes: round {number_of_round} of {rounds}", flush=True)
            # Who comes first meets what the call before has left, so that changes.
            first = number_of_round % len(_SUBJECTS)
            subjects = [*_SUBJECTS[first:], *_SUBJECTS[:first]]
            for count, call, subject in itertools.product(PROCESSES, CALLS, subjects):
                if call == "set_result":
                    await server.empty(subject.table)
                window = seconds if number_of_round else _WARM_UP_SECONDS
                cost = await _measure(server, clients[:count], subject, call, window)
                if number_of_round:  # round 0 is to warm up
                    found[call, count, subject].append(cost)
    return {
        key: Cost(*(median(values) for values in zip(*costs, strict=True)))
        for key, costs in found.items()
    }


async def _measure(
    server: PostgresServer,
    clients: Sequence[Connection],
    subject: Contender,
    call: str,
    seconds: float,
) -> Cost:
    before = await server.cpu_seconds()
    start = time.monotonic() + _LEAD
    for client in clients:
        client.send(_Order(subject.name, call, start, start + seconds))
    done: list[_Done] = [await asyncio.to_thread(client.recv) for client in clients]
    server_seconds = await server.cpu_seconds() - before
    calls = sum(each.calls for each in done)
    # From the first to the last of all: nobody's calls count for whom nobody's time does.
    took = max(each.end for each in done) - min(each.start for each in done)
    client_seconds = sum(each.cpu_seconds for each in done)
    return Cost(calls / took, client_seconds / calls * 1e6, server_seconds / calls * 1e6)


@asynccontextmanager
async def _client(address: str) -> AsyncIterator[Connection]:
    """A process that carries out each order sent to it, and is connected already."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, address), daemon=True)
    process.start()
    # Else its death would not end our pipe.
    its.close()
    try:
        await asyncio.to_thread(ours.recv)
        yield ours
    finally:
        # The end of the pipe ends the process.
        ours.close()
        await asyncio.to_thread(process.join)


def _serve(orders: Connection, address: str) -> None:
    asyncio.run(_carry_out(orders, address))


async def _carry_out(orders: Connection, address: str) -> None:
    async with AsyncExitStack() as stack:
        loads = {
            each.name: _Load(await stack.enter_async_context(started(each, address, "processes")))
            for each in _SUBJECTS
        }
        orders.send("ready")
        while True:
            try:
                order: _Order = await asyncio.to_thread(orders.recv)
            except EOFError:
                return
            orders.send(await loads[order.contender].run(order))


class _Load:
    """What a process does with one contender's backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stored: list[str] = []  # by this process, since the table was emptied

    async def run(self, order: _Order) -> _Done:
        call, task_ids = self._prepare(order.call)
        gc.collect()
        await asyncio.sleep(order.start - time.monotonic())
        start, cpu_seconds = time.monotonic(), time.process_time()
        latencies = await call_until(call, task_ids, CALLERS, order.end - start)
        end = time.monotonic()
        return _Done(len(latencies), start, end, time.process_time() - cpu_seconds)

    def _prepare(self, name: str) -> tuple[Call, Iterator[str]]:
        if name == "get_result":
            return self._backend.get_result, itertools.cycle(self._stored[:_TASKS])
        self._stored.clear()
        backend, result = self._backend, make_result(make_payload(_BYTES))
        return lambda task_id: backend.set_result(task_id, result), self._new_ids()

    def _new_ids(self) -> Iterator[str]:
        for task_id in new_ids():
            self._stored.append(task_id)
            yield task_id


def processes_report(costs: Costs, rounds: int, seconds: float) -> str:
    """A part of the report."""
    rates, times = [], []
    for call, count in itertools.product(CALLS, PROCESSES):
        ours, peer, again = (costs[call, count, each] for each in _SUBJECTS)
        first = [f"`{call}`", str(count)]
        rate = _ratio(ours.per_second / peer.per_second)
        noise = _noise(peer.per_second, again.per_second)
        rates.append([*first, number(ours.per_second), number(peer.per_second), rate, noise])
        figures = (ours.client_us, ours.server_us, peer.client_us, peer.server_us)
        cost = _ratio(peer.both_us / ours.both_us)
        noise = _noise(peer.both_us, again.both_us)
        times.append([*first, *map(number, figures), cost, noise])
    names = [f"{each.name}:" for each in (OURS, PEER)]
    both = [f"{each.name}: {side}:" for each in (OURS, PEER) for side in ("client", "server")]
    counts = f"{', '.join(map(str, PROCESSES[:-1]))} and {PROCESSES[-1]}"
    ratio, inverse = f"{OURS.name} / {PEER.name}:", f"{PEER.name} / {OURS.name}:"
    return f"""## Several processes

{counts} client processes with {CALLERS} callers each began at the same time and ran for
{seconds:g} s. They were connected before. `set_result` started with an empty table; `get_result`
read the results that its process had stored. The backends took turns in each of {rounds} rounds;
the figures are medians. {PEER.name} was measured twice: the noise is the
difference between the two.

Results per second of all processes together, which share the cores with the server:

{table(["call", "processes:", *names, ratio, "noise:"], rates)}

CPU time per result in microseconds: of the client processes, and of all server processes, including
background ones. Ratio and noise are those of client and server together.

{table(["call", "processes:", *both, inverse, "noise:"], times)}
"""


def _ratio(value: float) -> str:
    return f"{number(value)}x"


def _noise(one: float, other: float) -> str:
    return f"{max(one, other) / min(one, other) - 1:.0%}"
