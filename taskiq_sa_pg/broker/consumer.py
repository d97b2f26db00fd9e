"""The worker's side of the queue: claims tasks as fast as they are consumed."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final

from taskiq import AckableMessage

from taskiq_sa_pg.background import end_task, is_running, start_task
from taskiq_sa_pg.broker.claims import Claim, Claims
from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import NotStartedError
from taskiq_sa_pg.statements import MAX_PRIORITY, Claimed, claim_tasks, select_next_due
from taskiq_sa_pg.waiting import Listener

logger = logging.getLogger(__name__)

# Larger claims were not measurably faster.
_MAX_CLAIMS: Final = 50


class Consumer:
    """Claims the tasks of some queues.

    It claims tasks only when one is wanted and none is left: one at first, and twice as many each
    time while all are consumed at once. Tasks that are not consumed soon are released.

    Args:
        settings: The broker's settings.
        database: The queue's database.
        claims: Holds the claims.
        listener: Receives notifications of new tasks; None only polls.
        queue_names: The queues, in a different order for each claim.
        worker: The worker's name, for the column `worker`.
        is_known: Whether a task of this name is registered.
        abandon: Handles a task that was delivered too often; runs in a background task.
        announce: Notifies other workers of released tasks.
    """

    def __init__(
        self,
        settings: QueueSettings,
        database: Database,
        claims: Claims,
        listener: Listener | None,
        *,
        queue_names: Sequence[str],
        worker: str,
        is_known: Callable[[str], bool],
        abandon: Callable[[Claimed], Coroutine[Any, Any, None]],
        announce: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._timings = settings.timings
        self._database = database
        self._claims = claims
        self._listener = listener
        self._queue_names = deque(queue_names)
        self._worker = worker
        self._is_known = is_known
        self._abandon = abandon
        self._announce = announce
        self._claiming = claim_tasks(settings.queue_table)
        self._next_due = select_next_due(settings.queue_table)
        self._purpose = f"claim tasks of table {settings.table}"
        self._size = 1  # of the next claim
        self._buffer: deque[Claimed] = deque()
        self._is_wanted = asyncio.Event()  # next() waits, and the buffer is empty
        self._has_come = asyncio.Event()
        self._has_news = asyncio.Event()
        self._is_stopping = False
        self._is_warned = False
        self._unknown: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._abandoning: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Makes it check for tasks at once."""
        self._has_news.set()

    async def next(self) -> AckableMessage:
        """Waits for the next task.

        Raises:
            NotStartedError: It was stopped.
        """
        while not self._is_stopping:
            while self._buffer:
                claimed = self._buffer.popleft()
                claim = _claim_of(claimed)
                if self._claims.is_held(claim):  # otherwise it was sent again meanwhile
                    return self._claims.hand_over(claim, claimed.message)
            if not is_running(self._task):
                self._task = start_task(self._run())
                # If the application cancels it with all other tasks, it is started again.
                self._task.add_done_callback(lambda _: self._has_come.set())
            self._has_come.clear()
            self._is_wanted.set()
            await self._has_come.wait()
        raise NotStartedError("the broker was shut down while this listened")

    async def stop(self) -> None:
        """Stops claiming, and releases tasks that were not consumed."""
        self._is_stopping = True
        self._has_come.set()
        self._is_wanted.set()
        self._has_news.set()
        if self._task is not None:
            # Not cancelled: tasks claimed by its statement would be stuck until their leases end.
            _ = await asyncio.wait([self._task], timeout=self._timings.end_of_claim)
            await end_task(self._task)
        # Bounded: in an outage, the tasks are delivered again when their leases end.
        if self._abandoning:
            _ = await asyncio.wait(self._abandoning, timeout=self._timings.end_of_claim)
            for each in list(self._abandoning):
                await end_task(each)
        await self._give_back(self._timings.end_of_claim)

    async def _run(self) -> None:
        while not self._is_stopping:
            await self._is_wanted.wait()
            if self._is_stopping:
                return
            self._has_news.clear()
            try:
                claimed = await self._claim()
                if not claimed:
                    self._size = 1
                    await self._wait_for_tasks()
                    continue
            except Exception as exc:  # noqa: BLE001 - after any error, the worker must continue
                self._warn(exc)
                await self._wait(self._timings.between_unheard_polls)
                continue
            self._is_warned = False
            executable = await self._sort_out(claimed)
            if executable and not self._is_stopping:
                await self._hand_out(executable)
            else:
                self._buffer.extend(executable)

    async def _claim(self) -> Sequence[Claimed]:
        self._queue_names.rotate(-1)
        parameters = {
            **self._which(),
            "size": self._size,
            "lease": self._settings.lease,
            "given_worker": self._worker,
        }
        rows = await self._database.fetch(self._claiming, parameters, self._purpose)
        claimed = [Claimed(*row) for row in rows]
        self._claims.hold(map(_claim_of, claimed))
        return sorted(claimed, key=lambda each: (-each.priority, each.queued_at))

    def _still_unknown(self) -> list[str]:
        # A task may be registered later.
        self._unknown = {name for name in self._unknown if not self._is_known(name)}
        return list(self._unknown)

    def _which(self) -> dict[str, list[Any]]:
        names = list(self._queue_names)
        priorities = range(MAX_PRIORITY, -1, -1)
        return {
            "given_queue_name": names * len(priorities),
            "given_priority": [priority for priority in priorities for _ in names],
            "given_unknown": self._still_unknown(),
        }

    async def _hand_out(self, claimed: Sequence[Claimed]) -> None:
        """Returns when all are consumed and more are wanted, or after the rest is released."""
        self._buffer.extend(claimed)
        self._is_wanted.clear()
        self._has_come.set()
        try:
            async with asyncio.timeout(self._timings.unused_claim):
                await self._is_wanted.wait()
        except TimeoutError:
            self._size = max(1, len(claimed) - len(self._buffer))
            await self._give_back()
        else:
            if len(claimed) == self._size:
                self._size = min(2 * self._size, _MAX_CLAIMS)

    async def _give_back(self, retry_timeout: float | None = None) -> None:
        unused = [_claim_of(claimed) for claimed in self._buffer]
        self._buffer.clear()
        if unused:
            await self._claims.release(unused, retry_timeout=retry_timeout)
            self._announce()

    async def _sort_out(self, claimed: Sequence[Claimed]) -> list[Claimed]:
        """Returns the tasks that can be executed; abandons or releases the others."""
        executable, unknown = [], []
        for each in claimed:
            if each.deliveries > self._settings.max_deliveries:
                task = start_task(self._abandon(each))
                self._abandoning.add(task)
                task.add_done_callback(self._abandoning.discard)
            elif self._is_known(each.task_name):
                executable.append(each)
            else:
                unknown.append(each)
        if unknown:
            self._warn_unknown(unknown)
            await self._claims.release(list(map(_claim_of, unknown)))
            self._announce()
        return executable

    def _warn_unknown(self, unknown: Sequence[Claimed]) -> None:
        for name in {each.task_name for each in unknown} - self._unknown:
            self._unknown.add(name)
            logger.warning(
                'task "%s" is not known to this worker, so it is left to other workers. Is its '
                "module imported?",
                name,
            )

    async def _wait_for_tasks(self) -> None:
        timings = self._timings
        rows = await self._database.fetch(self._next_due, self._which(), self._purpose)
        due_in = rows[0][0]
        if self._listener is not None:
            self._listener.start()  # the application may have cancelled it with all other tasks
        is_heard = self._listener is not None and self._listener.is_healthy
        seconds = timings.between_polls if is_heard else timings.between_unheard_polls
        if due_in is not None:
            # A task that is already due is just being claimed by another worker.
            seconds = min(seconds, due_in if due_in > 0 else timings.between_busy_polls)
        await self._wait(seconds)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_news.wait()

    def _warn(self, exc: Exception) -> None:
        if not self._is_warned:
            logger.warning("no tasks can be claimed, retrying: %s", exc)
        self._is_warned = True


def _claim_of(claimed: Claimed) -> Claim:
    return Claim(claimed.task_id, claimed.claim)
