"""The claims that a process holds: renewed while a task runs, then acknowledged.

A claim is a task id and a number. The queue's row has this number until the task is claimed again
or sent again.
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

# How often a lease is renewed before it would end.
_RENEWALS: Final = 3


class Claim(NamedTuple):
    """A task that this process has claimed, until its lease ends or the task is sent again."""

    task_id: Any
    number: int

    def __str__(self) -> str:
        return str(self.task_id)  # for errors


class _Delivery(AckableMessage):
    """A message that reports when its data is read, which is when taskiq begins to process it."""

    on_read: Callable[[], None]


def _read(delivery: _Delivery) -> bytes:
    vars(delivery)["on_read"]()
    data: bytes = vars(delivery)["data"]
    return data


# A property for this field only, so that access to the others is not slower.
_Delivery.data = property(_read)  # type: ignore[assignment]  # a field in the base class


class Claims:
    """Holds, renews and ends the claims of a process, for one event loop."""

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
        """The message for taskiq; the claim is renewed until the asyncio task that reads it ends.

        If it is not acknowledged by then, the task is delivered again when its lease ends.
        """

        async def acknowledge() -> None:
            await self._end(claim)

        def end_with_its_reader() -> None:
            # Not at the end of the message object, which taskiq's receiver keeps until the next.
            reader = asyncio.current_task()
            if reader is not None:
                reader.add_done_callback(lambda _: self.drop([claim]))

        return _Delivery.model_construct(data=data, ack=acknowledge, on_read=end_with_its_reader)

    def is_held(self, claim: Claim) -> bool:
        """Whether a claim is being renewed."""
        return self._held.get(claim.task_id) == claim.number

    def held(self, task_id: Any) -> Claim | None:
        """The claim of a task that is being renewed; None if there is none."""
        number = self._held.get(task_id)
        return None if number is None else Claim(task_id, number)

    def drop(self, claims: Iterable[Claim]) -> None:
        """Stops renewing claims."""
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
        """Returns tasks to the queue, due in `delay` seconds.

        Without a delay, they keep their place before tasks that were sent later; otherwise they
        might wait for ever behind a backlog. Only if `is_begun` do they count as delivered. Errors
        of PostgreSQL are logged; the tasks are then delivered again when their leases end.
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
        """Parks tasks, which are then not delivered again. Errors are logged, as in release()."""
        self.drop(claims)
        await self._change(self._parking, claims, f"park tasks of table {self._table}")

    async def close(self) -> None:
        """Returns all unacknowledged tasks to the queue."""
        renewer, self._renewer = self._renewer, None
        await end_task(renewer)
        await self._acknowledge.close()
        await self.release(self._claims(), is_begun=True, retry_timeout=self._end_of_claim)

    def _claims(self) -> list[Claim]:
        return [Claim(task_id, number) for task_id, number in self._held.items()]

    async def _end(self, claim: Claim) -> None:
        # False if this process has sent it again, or if the asyncio task that read it has ended.
        was_held = self.is_held(claim)
        is_ours = await self._acknowledge.submit(claim, None)
        self.drop([claim])
        if was_held and not is_ours:
            logger.warning(
                "task %s: its lease of %g s was lost before it was acknowledged, so it may run "
                "twice, unless it was sent again meanwhile. Did it block the event loop, or was "
                "PostgreSQL unreachable?",
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
            # After an outage as long as the pause, renew at once: the lease may still be valid.
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
    # In the order in which senders lock rows; other orders could deadlock.
    task_ids, numbers = zip(*sorted(claims), strict=True)
    return {"given_task_id": list(task_ids), "given_claim": list(numbers)}
