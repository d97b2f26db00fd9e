"""`make chaos`: sends tasks while workers and PostgreSQL are killed; tells what became of them."""

import argparse
import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Final

import psutil

from examples.demo import workers
from taskiq_sa_pg.embedded import postgres
from tests.conftest import eventually
from tests.faults.conftest import DRIVERS, make_tables
from tests.faults.drills import HERE, environment, imported, make_queue, target
from tests.faults.outages import restart, terminate_often
from tests.faults.proxy import Proxy, proxied
from tests.faults.servers import Programs, Server, ask, dsn_of, servers

SENDERS: Final = 20
MOST_WAITING: Final = 1000
AT_ONCE: Final = 10  # by a worker process, which may have one more in hand
LEASE: Final = 5.0
SECONDS_PER_TASK: Final = 0.02
BETWEEN_OUTAGES: Final = 10.0
LONGEST_END: Final = 120.0


@dataclass
class Account:
    """What was done, and by it to whom."""

    sent: list[str] = field(default_factory=list)
    not_sent: list[str] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)
    outages: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of the tasks that were sent: their numbers."""

    run: int
    lost: int
    parked: int
    without_result: int
    repeated: int
    repeated_after_a_kill: int


class Storm:
    """Sends tasks, and at the same time kills workers and what they work with."""

    def __init__(
        self, options: argparse.Namespace, server: Server, proxy: Proxy, tasks: ModuleType
    ) -> None:
        self.account = Account()
        self._options = options
        self._server = server
        self._proxy = proxy
        self._tasks = tasks
        self._chance = random.Random(options.seed)
        self._numbers = iter(range(options.tasks))
        self._may_send = asyncio.Event()

    async def rage(self, crew: subprocess.Popen[bytes]) -> None:
        """Returns when all is sent, and nothing waits any more."""
        started_at = time.monotonic()
        faults = [
            asyncio.create_task(each) for each in (self._kill(crew), self._break(), self._watch())
        ]
        await asyncio.gather(*[self._send() for _ in range(SENDERS)])
        for fault in faults:
            fault.cancel()
        await asyncio.wait(faults)
        with suppress(AssertionError):  # what waits even then counts as lost
            await eventually(self._is_empty, LONGEST_END, pause=0.1)
        self.account.seconds = time.monotonic() - started_at

    async def _send(self) -> None:
        account = self.account
        for _ in self._numbers:
            await self._may_send.wait()
            try:
                sent = await self._tasks.work.kiq(SECONDS_PER_TASK)
            except Exception as exc:  # noqa: BLE001 - it is counted
                account.not_sent.append(repr(exc.__cause__ or exc))
            else:
                account.sent.append(sent.task_id)

    async def _kill(self, crew: subprocess.Popen[bytes]) -> None:
        while True:
            await asyncio.sleep(self._options.kill_every)
            some = [each.pid for each in psutil.Process(crew.pid).children()]
            with suppress(IndexError, ProcessLookupError):
                pid = self._chance.choice(some)
                os.kill(pid, signal.SIGKILL)
                self.account.killed.add(pid)

    async def _break(self) -> None:
        server, proxy = self._server, self._proxy

        async def cut() -> None:
            proxy.cut()

        outages: dict[str, Callable[[], Awaitable[None]]] = {
            "crash": lambda: restart(server, signal.SIGQUIT),
            "cut": cut,
            "fast restart": lambda: restart(server, signal.SIGINT),
            "terminated connections": lambda: terminate_often(server, times=3),
            "kill -9": lambda: restart(server, signal.SIGKILL),
        }
        for name in itertools.cycle(outages):
            await asyncio.sleep(BETWEEN_OUTAGES)
            self.account.outages[name] = self.account.outages.get(name, 0) + 1
            outage = asyncio.ensure_future(outages[name]())
            try:
                await asyncio.shield(outage)
            except asyncio.CancelledError:
                await outage  # to its end: the server has to be there again
                raise

    async def _watch(self) -> None:
        """Stops the senders while too much waits."""
        while True:
            await asyncio.sleep(0.2)
            if await self._count_waiting() < MOST_WAITING:
                self._may_send.set()
            else:
                self._may_send.clear()

    async def _is_empty(self) -> bool:
        return await self._count_waiting() == 0

    async def _count_waiting(self) -> int:
        waiting = "taskiq_results_queue WHERE available_at < 'infinity'"
        try:
            async with asyncio.timeout(5):
                return await _count(self._server, waiting)
        except Exception:  # noqa: BLE001 - in an outage; asyncpg has many errors for it
            return MOST_WAITING


async def chaos(options: argparse.Namespace, programs: Programs) -> int:
    with servers(programs) as [server]:
        await make_tables(server)
        await make_queue(server.dsn)
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(proxied(server.port))
            its = {"runs_dsn": server.dsn, "DRILL_MAX_DELIVERIES": "5"}
            dsn = dsn_of(proxy.port)
            stack.enter_context(environment(dsn, options.driver, lease=LEASE, **its))
            tasks = stack.enter_context(imported())
            # The proxy has to go on meanwhile.
            crew = workers(*target(at_once=AT_ONCE), cwd=HERE, count=options.workers)
            process = await asyncio.to_thread(crew.__enter__)
            storm = Storm(options, server, proxy, tasks)
            try:
                await tasks.broker.startup()
                await storm.rage(process)
                await tasks.broker.shutdown()
            finally:
                await asyncio.to_thread(crew.__exit__, None, None, None)
        outcome = await outcome_of(storm.account, server)
    return report(options, storm.account, outcome)


async def outcome_of(account: Account, server: Server) -> Outcome:
    pids: dict[str, list[int]] = {}
    for row in await ask(server.dsn, "SELECT task_id, pid FROM runs ORDER BY at"):
        pids.setdefault(row["task_id"], []).append(row["pid"])
    results = {row[0] for row in await ask(server.dsn, "SELECT task_id FROM taskiq_results")}
    sent = set(account.sent)
    again = [(pid in account.killed) for each in pids.values() for pid in each[:-1]]
    return Outcome(
        run=len(sent & pids.keys()),
        lost=len(sent - pids.keys()),
        parked=await _count(server, "taskiq_results_queue WHERE available_at = 'infinity'"),
        without_result=len(sent - results),
        repeated=len(again),
        repeated_after_a_kill=sum(again),
    )


def report(options: argparse.Namespace, account: Account, outcome: Outcome) -> int:
    """Prints what became of the tasks; returns 1 where one was lost, or ran again without need."""
    most = len(account.killed) * (AT_ONCE + 1)
    # A sender that loses the answer sends again, and a worker may lose its lease.
    outages = sum(account.outages.values())
    most_other = outages * (SENDERS + options.workers * (AT_ONCE + 1))
    others = outcome.repeated - outcome.repeated_after_a_kill
    counts = ", ".join(f"{name} {count}" for name, count in account.outages.items())
    print(f"in {account.seconds:.0f} s: workers killed {len(account.killed)}, {counts}")
    print(f"sent: {len(account.sent):,}")
    print(f"not sent: {len(account.not_sent):,}", *account.not_sent[:3], sep="\n  ")
    print(f"run: {outcome.run:,}")
    print(f"run again after a kill: {outcome.repeated_after_a_kill:,} (at most {most:,})")
    print(f"run again without one: {others:,} (at most {most_other:,})")
    print(f"lost: {outcome.lost:,}")
    print(f"without a result: {outcome.without_result:,}")
    print(f"parked: {outcome.parked:,}")
    is_wrong = outcome.lost or outcome.parked or outcome.without_result or account.not_sent
    is_too_often = outcome.repeated_after_a_kill > most or others > most_other
    return 1 if is_wrong or is_too_often else 0


async def _count(server: Server, rows: str) -> int:
    return int((await ask(server.dsn, f"SELECT count(*) FROM {rows}"))[0][0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kill-every", type=float, default=3)
    parser.add_argument("--driver", choices=DRIVERS, default=DRIVERS[0])
    parser.add_argument("--seed", type=int, default=1)
    with postgres() as embedded:
        programs = Programs.of(embedded.dsn)
        sys.exit(asyncio.run(chaos(parser.parse_args(), programs)))
