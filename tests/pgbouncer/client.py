"""One of several processes on the same tables: prints the ids whose results were lost or mixed up.

Each has results of its own, and does the same as the others in another order: the names that its
driver gives to prepared statements are then those of other statements in the other processes.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

# More often than drivers wait before they prepare a statement, on each of the connections.
_ROUNDS = 12


class Client:
    """Calls a backend, and notes whatever has another answer than the one that was stored."""

    def __init__(self, backend: Backend, own: Sequence[str], others: Sequence[str]) -> None:
        self.backend = backend
        self.own = own
        self.others = others
        self.wrong: set[str] = set()
        self.errors: set[str] = set()

    async def _each(
        self,
        call: Callable[[str], Awaitable[Any]],
        is_right: Callable[[Any, str], bool],
        number: int | None = None,
    ) -> None:
        own = self.own[:number]
        answers = await asyncio.gather(*map(call, own), return_exceptions=True)
        for task_id, answer in zip(own, answers, strict=True):
            if isinstance(answer, BaseException):
                self.errors.add(f"{answer!r}"[:300])
            if isinstance(answer, BaseException) or not is_right(answer, task_id):
                self.wrong.add(task_id)

    async def store(self) -> None:
        backend = self.backend
        await self._each(lambda i: backend.set_result(i, result_of(i)), lambda _, __: True)

    async def ask(self) -> None:
        await self._each(self.backend.is_result_ready, lambda is_ready, _: is_ready is True)

    async def get(self) -> None:
        await self._each(self.backend.get_result, lambda result, i: result.return_value == i)

    async def report(self) -> None:
        backend = self.backend
        await self._each(lambda i: backend.set_progress(i, progress_of(i)), lambda _, __: True)
        await self._each(backend.get_progress, lambda it, i: it is not None and it.meta == i)

    async def forget(self) -> None:
        forget = self.backend.forget  # a statement for each
        await self._each(lambda i: forget([f"no {i}"]), lambda count, _: count == 0, 10)

    async def look(self) -> None:
        """At those of the others, which may be there or not, but as they were stored."""
        try:
            found = await self.backend.get_results(self.others)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is wrong
            self.errors.add(f"{exc!r}"[:300])
            return
        self.wrong |= {i for i, result in found.items() if result.return_value != i}


@asynccontextmanager
async def started(dsn: str, **options: Any) -> AsyncIterator[Backend]:
    backend: Backend = SQLAlchemyResultBackend(
        dsn, check_schema="off", notify=False, retry_timeout=0, **options
    )
    await backend.startup()
    yield backend
    await backend.shutdown()


async def main(dsn: str, number: int, processes: int, task_ids: list[str]) -> None:
    own = task_ids[number::processes]
    others = sorted(set(task_ids) - set(own))
    async with started(dsn) as keeping, started(dsn, keep_results=False) as taking:
        client = Client(keeping, own, others)
        await client.store()
        calls = [client.store, client.ask, client.get, client.report, client.forget, client.look]
        calls = calls[2 * number :] + calls[: 2 * number]
        for _ in range(_ROUNDS):
            for call in calls:
                await call()
        taker = Client(taking, own[::2], others)
        await taker.get()
    found = [sorted(client.wrong | taker.wrong), sorted(client.errors | taker.errors)]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])))
