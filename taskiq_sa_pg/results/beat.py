"""Heartbeats of a process that executes tasks: its row is renewed until the process stops."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from threading import Lock
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy import Select

from taskiq_sa_pg.background import end_task, is_running, start_task
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.statements import LOST_AFTER
from taskiq_sa_pg.timings import Timings

logger = logging.getLogger(__name__)

# Approximately the start of the process.
_LOADED_AT: Final = time.monotonic()

# Of all backends in this process: two may share a row, which the last one deletes.
_beats: Final[WeakSet["Beat"]] = WeakSet()
_turns: Final = Lock()


class Beat:
    """Renews the row of a worker; for one event loop.

    Args:
        name: The worker's name in the table.
        statements: beat() and delete_worker() for the table.
        database: The database of the table.
        timings: Interval and time limits.
        place: The table's name for messages.
        is_own_name: Whether no other process can have this name at the same time.
        after: Called after each stored beat.
    """

    def __init__(
        self,
        name: str,
        statements: tuple[Select[Any], Select[Any]],
        database: Database,
        timings: Timings,
        *,
        place: str,
        is_own_name: bool,
        after: Callable[[], Awaitable[None]],
    ) -> None:
        self._name = name
        self._database = database
        self._timings = timings
        self._place = place
        self._is_own_name = is_own_name
        self._after = after
        self._renewal, self._deletion = statements
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._seen_at: datetime | None = None
        self._shared_until = -1.0
        self._is_warned = False
        self._is_ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it has begun and not ended; it also ends with its event loop."""
        return is_running(self._task) and not self._loop.is_closed()

    @property
    def is_seen(self) -> bool:
        """Whether it was ever stored."""
        return self._seen_at is not None

    def begin(self) -> None:
        """Begins it, if it is not running."""
        if not self.is_running:
            with _turns:
                _beats.add(self)
            self._is_ending.clear()
            self._task = start_task(self._run())

    async def end(self) -> None:
        """Ends it, and deletes the row unless others share it; within two seconds."""
        ending = start_task(self._end())
        # A failure is only logged: an unreachable database must not delay the stop.
        ending.add_done_callback(_note_failure)
        try:
            await asyncio.wait([ending], timeout=self._timings.end_of_beat)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        task, self._task = self._task, None
        self._is_ending.set()
        if task is not None:
            # Not cancelled at once: the seen_at that a running statement stores would be unknown.
            await asyncio.wait([task], timeout=self._timings.end_of_beat / 2)
        await end_task(task)
        if self._seen_at is None or self._loop.time() < self._shared_until:
            return
        peers = self._peers()
        for peer in peers:  # the last of them deletes the row as it is now
            peer._seen_at = max(self._seen_at, peer._seen_at or self._seen_at)
        if peers:
            return
        parameters = {"of_worker": self._name, "was_seen_at": self._seen_at}
        purpose = f"delete worker {self._name!r} from table {self._place}"
        seconds = self._timings.end_of_beat
        await self._database.fetch(self._deletion, parameters, purpose, retry_timeout=seconds)

    async def _run(self) -> None:
        while not self._is_ending.is_set():
            try:
                await self._beat()
                await self._after()
            except Exception as exc:  # noqa: BLE001 - whatever failed, the next one may succeed
                if not self._is_warned:
                    logger.warning("a heartbeat of worker %s failed: %s", self._name, exc)
                self._is_warned = True
            else:
                self._is_warned = False
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timings.between_beats):
                    await self._is_ending.wait()

    async def _beat(self) -> None:
        parameters = {
            "of_worker": self._name,
            "age": time.monotonic() - _LOADED_AT,
            "is_first": self._seen_at is None,
            "is_own_name": self._is_own_name,
        }
        purpose = f"store worker {self._name!r} in table {self._place}"
        [(seen_at, before)] = await self._database.fetch(
            self._renewal, parameters, purpose, retry_timeout=self._timings.beat
        )
        if not self._is_own_name and before is not None:
            # Another process with this name is alive: the first one to stop keeps the row for it.
            is_fresh = seen_at - before < timedelta(seconds=LOST_AFTER)
            if is_fresh and before not in {each._seen_at for each in (self, *self._peers())}:
                self._shared_until = self._loop.time() + LOST_AFTER
        self._seen_at = seen_at

    def _peers(self) -> list["Beat"]:
        """Other beats in this process that share the row."""
        with _turns:
            beats = list(_beats)
        return [
            each
            for each in beats
            if each is not self
            and each.is_running
            and (each._pid, each._name, each._place) == (os.getpid(), self._name, self._place)
            and each._database.leads_where(self._database)
        ]


def _note_failure(ending: asyncio.Task[None]) -> None:
    if not ending.cancelled() and ending.exception() is not None:
        logger.debug("the row of a worker was not deleted: %s", ending.exception())
