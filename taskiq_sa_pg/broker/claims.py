"""The claims that a process holds: renewed as long as somebody works on them, then acknowledged.

A claim is a task id and the number of the claim, which the queue's row has as long as nobody else
has claimed the task, or sent it again.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

from taskiq import AckableMessage

from taskiq_sa_pg.background import end_task, is_running, start_task
from taskiq_sa_pg.batching import MAX_ROWS, Batcher, Entry
from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import (
    acknowledge_claims,
    park_claims,
    release_claims,
    renew_claims,
)

logger = logging.getLogger(__name__)

# So often a lease is prolonged before it would end.
_RENEWALS: Final = 3


class Claim(NamedTuple):
    """A task that this process has, until the lease ends or somebody sends it again."""

    task_id: Any
    number: int

    def __str__(self) -> str:
        return str(self.task_id)  # as errors name it


class _Delivery(AckableMessage):
    """A message that tells when it is read, which is where taskiq begins to work on it."""

    on_read: Callable[[], None]


def _read(delivery: _Delivery) -> bytes:
    vars(delivery)["on_read"]()
    data: bytes = vars(delivery)["data"]
    return data


# Of all its attributes this is the one that is slower than it was.
_Delivery.data = property(_read)  # type: ignore[assignment]  # a field, there


class Claims:
    """Holds, renews and ends the claims of a process. Made for one event loop."""

    def __init__(self, settings: QueueSettings, database: Database) -> None:
        self._database = database
        self._lease = settings.lease
        self._end_of_claim = settings.timings.end_of_claim
        self._table = settings.table
        queue = settings.queue_table
        self._renewal: Final = renew_claims(queue)
        self._release: Final = release_claims(queue)
        self._parking: Final = park_claims(queue)
        self._acknowledgement: Final = acknowledge_claims(queue)
        self._held: dict[Any, int] = {}  # the number by task id
        self._acknowledge: Batcher[Claim, None, None, bool] = Batcher(
            self._store_acknowledgements, encode=lambda *_: None
        )
        self._renewer: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, claims: Iterable[Claim]) -> None:
        """Renews claims from now on."""
        for claim in claims:
            self._held[claim.task_id] = claim.number
        if not is_running(self._renewer):
            self._renewer = start_task(self._renew())

    def hand_over(self, claim: Claim, data: bytes) -> AckableMessage:
        """The message as taskiq gets it; the claim is renewed until the task that reads it ends.

        What it has not acknowledged by then is delivered again when its lease ends.
        """

        async def acknowledge() -> None:
            await self._end(claim)

        def end_with_its_reader() -> None:
            # Not with the message: taskiq's receiver keeps the last one until the next comes.
            reader = asyncio.current_task()
            if reader is not None:
                reader.add_done_callback(lambda _: self.drop([claim]))

        return _Delivery.model_construct(data=data, ack=acknowledge, on_read=end_with_its_reader)

    def is_held(self, claim: Claim) -> bool:
        """Whether it is renewed."""
        return self._held.get(claim.task_id) == claim.number

    def held(self, task_id: Any) -> Claim | None:
        """The claim of a task that is renewed."""
        number = self._held.get(task_id)
        return None if number is None else Claim(task_id, number)

    def drop(self, claims: Iterable[Claim]) -> None:
        """Renews claims no more."""
        for claim in claims:
            if self.is_held(claim):
                del self._held[claim.task_id]

    async def release(
        self,
        claims: Collection[Claim],
        delay: float | None = None,
        *,
        is_begun: bool = False,
        retry_timeout: float | None = None,
    ) -> None:
        """Gives tasks back, due in `delay` seconds; they were delivered only if they are begun.

        Without a delay they go before what was sent later, as they did: behind a backlog they might
        wait for ever.

        Where PostgreSQL cannot be asked, that is logged, and they come back when their lease ends.
        """
        self.drop(claims)
        await self._change(
            self._release,
            claims,
            f"release tasks of table {self._table}",
            {"delay": delay, "undelivered": int(not is_begun)},
            retry_timeout,
        )

    async def park(self, claims: Collection[Claim]) -> None:
        """Leaves tasks where no worker takes them; fails as release()."""
        self.drop(claims)
        await self._change(self._parking, claims, f"park tasks of table {self._table}")

    async def close(self) -> None:
        """Gives back what taskiq has not acknowledged, and holds nothing more."""
        renewer, self._renewer = self._renewer, None
        await end_task(renewer)
        await self._acknowledge.close()
        await self.release(self._claims(), is_begun=True, retry_timeout=self._end_of_claim)

    def _claims(self) -> list[Claim]:
        return [Claim(task_id, number) for task_id, number in self._held.items()]

    async def _end(self, claim: Claim) -> None:
        # One that is not, was sent again by this process, or outlived the task that got it.
        was_held = self.is_held(claim)
        is_ours = await self._acknowledge.submit(claim, None)
        self.drop([claim])
        if was_held and not is_ours:
            logger.warning(
                "task %s: its lease of %g s was lost before it was acknowledged, so it may run "
                "twice, unless it was sent again meanwhile. Did it block the event loop, or was "
                "PostgreSQL out of reach?",
                *(claim.task_id, self._lease),
            )

    async def _store_acknowledgements(
        self, batch: Mapping[Claim, Entry[None]]
    ) -> Mapping[Claim, bool]:
        purpose = f"acknowledge it in table {self._table}"
        parameters = _arrays_of(batch.keys())
        rows = await self._database.fetch(self._acknowledgement, parameters, purpose)
        deleted = {Claim(*row) for row in rows}
        return {claim: claim in deleted for claim in batch}

    async def _renew(self) -> None:
        loop, pause = asyncio.get_running_loop(), self._lease / _RENEWALS
        seconds = pause
        while True:
            await asyncio.sleep(seconds)
            began_at = loop.time()
            purpose = f"renew the leases of tasks of table {self._table}"
            claims = self._claims()
            await self._change(self._renewal, claims, purpose, {"lease": self._lease}, pause)
            # An outage that took the pause leaves none: the lease may just outlive it.
            seconds = max(0.0, pause - (loop.time() - began_at))

    async def _change(
        self,
        statement: Any,
        claims: Collection[Claim],
        purpose: str,
        parameters: Mapping[str, Any] | None = None,
        retry_timeout: float | None = None,
    ) -> None:
        rest = iter(claims)
        while some := list(islice(rest, MAX_ROWS)):
            arrays = {**_arrays_of(some), **(parameters or {})}
            try:
                _ = await self._database.fetch(
                    statement, arrays, purpose, retry_timeout=retry_timeout
                )
            except TaskiqSaPgError as exc:
                logger.warning("%s", exc)


def _arrays_of(claims: Iterable[Claim]) -> dict[str, list[Any]]:
    # In the order in which senders lock them, too: other orders deadlock.
    task_ids, numbers = zip(*sorted(claims), strict=True)
    return {"given_task_id": list(task_ids), "given_claim": list(numbers)}
