"""Callers and waiters under a fault, and the account of what became of their results."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.timings import Timings
from tests.faults.servers import ask
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]

# What is notified where nobody hears it is noticed by a look.
OFTEN = Timings(between_looks=0.5, between_probes=0.5)

RESULTS = 1000
CALLERS = 50
WAITERS = 100


@dataclass
class Account:
    """What was asked for and what came of it, by task id."""

    stored: set[str] = field(default_factory=set)
    failed: dict[str, Exception] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    disappointed: dict[str, Exception] = field(default_factory=dict)
    slowest: float = 0.0
    seconds_to_recover: float = 0.0

    def assert_nobody_failed(self) -> None:
        """Neither a caller nor a waiter met an error."""
        errors = list({repr(exc) for exc in (self.failed | self.disappointed).values()})
        counts = f"{len(self.failed)} callers and {len(self.disappointed)} waiters"
        assert not errors, f"{counts} failed: {errors[:3]}"

    async def assert_nothing_lost(self, dsn: str, table: str = "taskiq_results") -> None:
        """Every result that was acknowledged is there once, and nobody met an error."""
        self.assert_nobody_failed()
        assert len(self.stored) >= RESULTS
        assert len(self.served) == WAITERS
        rows = await ask(dsn, f'SELECT task_id, return_value FROM "{table}"')
        assert self.stored <= {row["task_id"] for row in rows}


async def under_load(backend: Backend, fault: Callable[[], Awaitable[None]]) -> Account:
    """Stores results from many callers, and waits for some, while the fault happens.

    It happens when a quarter of the results are stored; the load goes on until it is over.
    """
    load = _Load(backend)
    async with asyncio.TaskGroup() as group:
        for task_id in load.awaited:
            group.create_task(load.wait(task_id))
        for _ in range(CALLERS):
            group.create_task(load.call())
        await load.is_under_way.wait()
        await fault()
        load.account.seconds_to_recover = await seconds_for(backend)
        load.is_over.set()
    return load.account


class _Load:
    def __init__(self, backend: Backend) -> None:
        self.account = Account()
        self.awaited = [new_id() for _ in range(WAITERS)]
        # Half of them are waited for over the whole of the fault.
        self._early = iter(self.awaited[: WAITERS // 2])
        self._late = iter(self.awaited[WAITERS // 2 :])
        self.is_under_way, self.is_over = asyncio.Event(), asyncio.Event()
        self._backend = backend

    async def call(self) -> None:
        account = self.account
        while not self.is_over.is_set() or len(account.stored) + len(account.failed) < RESULTS:
            await self._store(next(self._early, None) or new_id())
            # A pace, so that there are results before, in and after the fault.
            await asyncio.sleep(0.01)
        for task_id in self._late:
            await self._store(task_id)

    async def wait(self, task_id: str) -> None:
        try:
            result = await self._backend.wait_result(task_id, timeout=90)
            assert result.return_value == task_id
        except Exception as exc:  # noqa: BLE001 - it is counted
            self.account.disappointed[task_id] = exc
        else:
            self.account.served.add(task_id)

    async def _store(self, task_id: str) -> None:
        started_at = time.monotonic()
        try:
            await self._backend.set_result(task_id, result_of(task_id))
        except Exception as exc:  # noqa: BLE001 - it is counted
            self.account.failed[task_id] = exc
        else:
            self.account.stored.add(task_id)
        self.account.slowest = max(self.account.slowest, time.monotonic() - started_at)
        if len(self.account.stored) >= RESULTS / 4:
            self.is_under_way.set()


async def seconds_for(backend: Backend) -> float:
    """How long one call takes, beside all the others."""
    started_at = time.monotonic()
    await backend.set_result(new_id(), result_of("after the fault"))
    return time.monotonic() - started_at
