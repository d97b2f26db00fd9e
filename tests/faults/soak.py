"""`make soak`: ten minutes of load with a fault every few seconds; prints what became of it."""

import argparse
import asyncio
import gc
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import IO, Any, Final

import psutil

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.embedded import postgres
from tests.faults.outages import (
    fall_silent,
    lock_the_table,
    restart,
    take_all_connections,
    terminate_often,
)
from tests.faults.proxy import Proxy, proxied
from tests.faults.servers import Programs, Server, ask, dsn_of, servers
from tests.tasks import new_id, progress_of, result_of

CALLERS: Final = 50
WAITERS: Final = 20

Backend = SQLAlchemyResultBackend[Any]


@dataclass
class Account:
    """What became of the calls. The ids of what was stored are kept out of memory, in a file."""

    ids: IO[str]
    stored: int = 0
    served: int = 0
    errors: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)

    def note_stored(self, task_id: str) -> None:
        self.ids.write(f"{task_id}\n")
        self.stored += 1

    def all_stored(self) -> set[str]:
        self.ids.seek(0)
        return set(self.ids.read().split())


def faults(server: Server, proxy: Proxy) -> dict[str, Callable[[], Awaitable[None]]]:
    async def cut() -> None:
        proxy.cut()

    return {
        "fast restart": lambda: restart(server, signal.SIGINT),
        "crash": lambda: restart(server, signal.SIGQUIT),
        "kill -9": lambda: restart(server, signal.SIGKILL),
        "terminated connections": lambda: terminate_often(server, times=1),
        "no connections left": lambda: take_all_connections(server, seconds=5),
        "locked table": lambda: lock_the_table(server, seconds=5),
        "cut": cut,
        "silence": lambda: fall_silent(proxy, seconds=3),
    }


async def soak(seconds: float, seed: int, programs: Programs) -> int:
    chance = random.Random(seed)
    with tempfile.TemporaryFile("w+") as ids, servers(programs) as [server]:
        account = Account(ids)
        async with proxied(server.port) as proxy:
            backend = Backend(dsn_of(proxy.port), run_migrations=True, command_timeout=5)
            await backend.startup()
            # Both ends are looked at with the same things in memory.
            await load(backend, account, lambda: account.stored >= 20_000)
            before = footprint(), await connections(server)
            is_over = asyncio.Event()
            running = asyncio.create_task(load(backend, account, is_over.is_set))
            possible = faults(server, proxy)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                name = chance.choice(list(possible))
                await possible[name]()
                account.faults[name] = account.faults.get(name, 0) + 1
                await asyncio.sleep(chance.uniform(1, 4))
            is_over.set()
            await running
            after = footprint(), await connections(server)
            rows = await ask(server.dsn, "SELECT task_id FROM taskiq_results")
            await backend.shutdown()
        lost = account.all_stored() - {row["task_id"] for row in rows}
    report(account, lost, before, after)
    return 1 if lost or account.errors else 0


async def load(backend: Backend, account: Account, is_over: Callable[[], bool]) -> None:
    async def caller() -> None:
        while not is_over():
            task_id = new_id()
            try:
                await backend.set_progress(task_id, progress_of(1))
                await backend.set_result(task_id, result_of(task_id))
                account.note_stored(task_id)
                assert await backend.is_result_ready(task_id)
            except Exception as exc:  # noqa: BLE001 - it is counted
                account.errors.append(repr(exc))
            await asyncio.sleep(0.05)

    async def waiter() -> None:
        while not is_over():
            task_id = new_id()
            waiting = asyncio.create_task(backend.wait_result(task_id, timeout=90))
            try:
                await backend.set_result(task_id, result_of(task_id))
                account.note_stored(task_id)
                assert (await waiting).return_value == task_id
                account.served += 1
            except Exception as exc:  # noqa: BLE001 - it is counted
                account.errors.append(repr(exc))
                waiting.cancel()
            await asyncio.sleep(0.1)

    await asyncio.gather(*[caller() for _ in range(CALLERS)], *[waiter() for _ in range(WAITERS)])


def footprint() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss / 1e6)


async def connections(server: Server) -> int:
    query = "SELECT FROM pg_stat_activity WHERE backend_type = 'client backend'"
    return len(await ask(server.dsn, query)) - 1


def report(account: Account, lost: set[str], before: Any, after: Any) -> None:
    print("faults:", ", ".join(f"{name} {count}" for name, count in account.faults.items()))
    print(f"results stored: {account.stored:,}")
    print(f"results lost: {len(lost):,}")
    print(f"waiters served: {account.served:,}")
    print(f"errors: {len(account.errors):,}", *account.errors[:5], sep="\n  ")
    print(f"memory: {before[0]:.0f} MB at the start, {after[0]:.0f} MB at the end")
    print(f"connections: {before[1]} at the start, {after[1]} at the end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with postgres() as embedded:
        programs = Programs.of(embedded.dsn)
        sys.exit(asyncio.run(soak(arguments.seconds, arguments.seed, programs)))
