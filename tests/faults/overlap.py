"""`python -m tests.faults.overlap [--seconds 60] [--dsn DSN]`: two processes, the same 1,000 tasks.

Both store, take, forget and prune results of the same task ids at once. Deletions lock their rows
in the order in which PostgreSQL finds them, so statements can deadlock; they are tried again. It
fails if a call fails, a result is lost or two readers get the same one, and tells how many
statements and deadlocks there were.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import asyncpg
from taskiq import TaskiqResult

from taskiq_sa_pg import ResultIsMissingError, SQLAlchemyResultBackend
from taskiq_sa_pg.embedded import postgres

IDS: Final = [f"task {number}" for number in range(1000)]
PROCESSES: Final = 2
CALLERS: Final = {"store": 40, "take": 40, "take_many": 4, "forget": 4, "prune": 1}
AT_ONCE: Final = 20


class Event(NamedTuple):
    """Something that was done with the result of a task, between two moments."""

    task_id: str
    what: str  # "stored", "taken" or "forgotten"
    token: str | None
    began_at: float
    ended_at: float


class Caller:
    """Does at random what the callers of one process do, and notes it."""

    def __init__(self, backend: SQLAlchemyResultBackend[Any]) -> None:
        self._backend = backend
        self._tokens = (f"{os.getpid()}-{number}" for number in itertools.count())
        self.events: list[Event] = []
        self.calls: Counter[str] = Counter()

    async def store(self) -> None:
        task_id, token = random.choice(IDS), next(self._tokens)
        result: TaskiqResult[Any] = TaskiqResult(
            is_err=False,
            return_value=token,
            execution_time=0.0,
            labels={"result_ttl": random.choice([0.05, 600, 600, 600])},
        )
        began_at = time.monotonic()
        await self._backend.set_result(task_id, result)
        # One that expires soon may be gone at any time.
        what = "stored" if result.labels["result_ttl"] > 1 else "forgotten"
        self._note(task_id, what, token, began_at)

    async def take(self) -> None:
        task_id, began_at = random.choice(IDS), time.monotonic()
        try:
            result = await self._backend.get_result(task_id)
        except ResultIsMissingError:
            return
        self._note(task_id, "taken", result.return_value, began_at)

    async def take_many(self) -> None:
        began_at = time.monotonic()
        found = await self._backend.get_results(random.sample(IDS, AT_ONCE))
        for task_id, result in found.items():
            self._note(task_id, "taken", result.return_value, began_at)

    async def forget(self) -> None:
        some, began_at = random.sample(IDS, AT_ONCE), time.monotonic()
        await self._backend.forget(some)
        for task_id in some:
            self._note(task_id, "forgotten", None, began_at)

    async def prune(self) -> None:
        await self._backend.prune()
        await asyncio.sleep(0.05)

    def _note(self, task_id: str, what: str, token: str | None, began_at: float) -> None:
        self.events.append(Event(task_id, what, token, began_at, time.monotonic()))


async def work(dsn: str, seconds: float) -> tuple[list[Event], Counter[str]]:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        dsn, keep_results=False, track="started"
    )
    await backend.startup()
    caller, deadline = Caller(backend), time.monotonic() + seconds

    async def repeat(name: str, call: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < deadline:
            await call()
            caller.calls[name] += 1

    async with asyncio.TaskGroup() as group:
        for name, number in CALLERS.items():
            for _ in range(number):
                group.create_task(repeat(name, getattr(caller, name)))
    await backend.shutdown()
    return caller.events, caller.calls


def work_in_process(dsn: str, seconds: float) -> tuple[list[Event], Counter[str]]:
    return asyncio.run(work(dsn, seconds))


def _task_id(event: Event) -> str:
    return event.task_id


def find_faults(events: list[Event], left: dict[str, str]) -> Iterator[str]:
    """What was read twice, or never stored, or is gone and nobody has it.

    Args:
        events: What all processes did.
        left: The token of the result of each task that still has one.
    """
    stored = {
        (event.task_id, event.token) for event in events if event.token and event.what != "taken"
    }
    taken = Counter((e.task_id, e.token) for e in events if e.what == "taken")
    for task_id, token in left.items():
        taken[task_id, token] += 1
    for found, times in taken.items():
        if times > 1:
            yield f"{found} was read {times} times"
        if found not in stored:
            yield f"{found} was never stored"
    for task_id, of_task in itertools.groupby(sorted(events, key=_task_id), key=_task_id):
        those = list(of_task)
        last = max((e for e in those if e.what == "stored"), key=lambda e: e.began_at, default=None)
        if last is None or task_id in left:
            continue
        if all(e.ended_at < last.began_at for e in those if e is not last and e.what != "stored"):
            yield f"the result of {task_id} is lost: {last}"


async def prepare(dsn: str) -> None:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(dsn, run_migrations=True)
    await backend.startup()
    await backend.shutdown()


async def read_rest(dsn: str) -> tuple[dict[str, str], int]:
    """The tokens that are left, by task id, and how many deadlocks there were."""
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(dsn)
    await backend.startup()
    left = await backend.get_results(IDS)
    await backend.shutdown()
    connection = await asyncpg.connect(dsn)
    await connection.execute("SELECT pg_stat_force_next_flush()")
    statement = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    deadlocks = await connection.fetchval(statement)
    await connection.close()
    return {task_id: result.return_value for task_id, result in left.items()}, deadlocks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--dsn", help="a server; without it, an embedded one is started")
    options = parser.parse_args()
    with ExitStack() as stack:
        dsn = options.dsn or stack.enter_context(postgres()).dsn
        asyncio.run(prepare(dsn))
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(PROCESSES))
        done = pool.starmap(work_in_process, [(dsn, options.seconds)] * PROCESSES)
        left, deadlocks = asyncio.run(read_rest(dsn))
    events = [event for found, _ in done for event in found]
    calls: Counter[str] = sum((each for _, each in done), Counter())
    faults = list(find_faults(events, left))
    print(f"calls: {dict(calls)}; deadlocks: {deadlocks}; left: {len(left)}")
    print("\n".join(faults[:20]) or "nothing was lost")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
