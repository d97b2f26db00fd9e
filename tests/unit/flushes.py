"""Flush functions for the tests of group commit, and what those tests share."""

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

from taskiq_sa_pg import StorageError
from taskiq_sa_pg.batching import Batcher, Entry

AnyBatcher = Batcher[Any, Any, Any, Any]
Batch = Mapping[Any, Entry[Any]]


def same(*key_and_item: Any) -> Any:
    """A row that is the item; of a row, its size."""
    return key_and_item[-1]


class Flush:
    """A flush in flight, which the test ends."""

    def __init__(self, batch: Batch) -> None:
        self.rows = {key: entry.row for key, entry in batch.items()}
        self.task = asyncio.current_task()
        self.outcome: asyncio.Future[Mapping[Any, Any]] = asyncio.Future()

    def end(self, answers: Mapping[Any, Any] | None = None) -> None:
        self.outcome.set_result(answers or {})

    def fail(self, exc: Exception) -> None:
        self.outcome.set_exception(exc)


class Flushes:
    """A flush function that leaves it to the test when and how each flush ends."""

    def __init__(self) -> None:
        self.begun: list[Flush] = []
        self._news = asyncio.Event()

    async def __call__(self, batch: Batch) -> Mapping[Any, Any]:
        flush = Flush(batch)
        self.begun.append(flush)
        self._news.set()
        return await flush.outcome

    async def number(self, number: int) -> Flush:
        """The flush of that number from 1 on, once it has begun."""
        while len(self.begun) < number:
            self._news.clear()
            await self._news.wait()
        return self.begun[number - 1]

    @property
    def keys(self) -> list[list[Any]]:
        """The keys of each flush."""
        return [list(flush.rows) for flush in self.begun]


def call(batcher: AnyBatcher, key: Any, item: Any) -> asyncio.Task[Any]:
    """A caller in a task of its own."""
    return asyncio.create_task(batcher.submit(key, item))


def submit(batcher: AnyBatcher, keys: Iterable[Any]) -> list[asyncio.Task[Any]]:
    """A caller for each key, with the key as its item."""
    return [call(batcher, key, key) for key in keys]


async def turns_of_the_loop(number: int = 10) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def outcomes_of(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def assert_at_rest(batcher: AnyBatcher) -> None:
    """Nothing is kept, nothing runs, and the next call works."""
    await turns_of_the_loop()
    assert batcher.is_idle
    assert batcher.pending == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


def refusal(sqlstate: str | None) -> StorageError:
    return StorageError("refused", sqlstate)


class Table:
    """A flush function that stores at once, but refuses a batch with one of certain values.

    Two flushes at a time must not hold the same key.
    """

    def __init__(self, refused: Iterable[Any] = (), error: Exception | None = None) -> None:
        self.stored: dict[Any, Any] = {}
        self.statements = 0
        self._in_flight: set[Any] = set()
        self._refused = set(refused)
        self._error = error or refusal("23514")

    async def __call__(self, batch: Batch) -> Mapping[Any, Any]:
        assert self._in_flight.isdisjoint(batch)
        self._in_flight.update(batch)
        try:
            await asyncio.sleep(0)
        finally:
            self._in_flight.difference_update(batch)
        self.statements += 1
        rows = {key: entry.row for key, entry in batch.items()}
        if not self._refused.isdisjoint(rows.values()):
            raise self._error
        self.stored.update(rows)
        return rows
