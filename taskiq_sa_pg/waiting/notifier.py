"""What is told to those who wait: the ids of rows that were stored, in PostgreSQL's notifications.

A notification is a hint, and the table is the truth. A payload is a JSON array of task ids; an
empty one tells of ids that are too long for any payload, for which their waiters have to look.
"""

import asyncio
import json
import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from taskiq_sa_pg.background import is_running, start_task
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import notify
from taskiq_sa_pg.timings import Timings

logger = logging.getLogger(__name__)

# https://www.postgresql.org/docs/18/sql-notify.html
_MAX_PAYLOAD_BYTES: Final = 7999


class Notifier:
    """Sends notifications after what they tell of was committed; nobody waits for it.

    They go in statements of their own: the lock that a notification takes would otherwise make
    all commits of results wait for each other.

    Args:
        database: Where they are sent.
        timings: The pauses after them, in which the next ones gather.
        pause: Another pause, whatever was sent.
    """

    def __init__(self, database: Database, timings: Timings, pause: float | None = None) -> None:
        self._database = database
        self._timings = timings
        self._pause = pause
        self._statement = notify()
        self._pending: dict[str, dict[Any, None]] = {}  # the ids of each channel, once each
        self._task: asyncio.Task[None] | None = None

    def announce(self, channel: str, ids: Iterable[Any]) -> None:
        """Tells of rows that were stored."""
        pending = self._pending.setdefault(channel, {})
        if len(pending) <= self._timings.max_pending_notifications:
            pending.update(dict.fromkeys(ids))
        self._start()

    async def send(self, channel: str, payloads: list[str]) -> bool:
        """Sends payloads at once; says whether by listen_dsn, as a read replica sends none.

        Raises:
            StorageError: They could not be sent.
        """
        parameters = {"channel": channel, "payloads": payloads}
        purpose = f"send notifications on channel {channel}"
        # Once: they are hints, and whoever listens looks again after an outage.
        sent = await self._database.fetch(self._statement, parameters, purpose, retry_timeout=0)
        if not sent:
            await self._database.fetch_by_listen_dsn(self._statement, parameters, purpose)
        return not sent

    async def close(self) -> None:
        """Returns when all has been sent."""
        while self._pending or is_running(self._task):
            self._start()  # it may have been cancelled, with all other tasks of the application
            assert self._task is not None
            await asyncio.wait([self._task])

    def _start(self) -> None:
        if not is_running(self._task):
            self._task = start_task(self._send_pending())

    async def _send_pending(self) -> None:
        while self._pending:
            await asyncio.sleep(0)  # those whose results are stored go first
            pending, self._pending = self._pending, {}
            for channel, ids in pending.items():
                await self._try_to_send(channel, ids)
            await asyncio.sleep(self._pause_after(max(map(len, pending.values()))))

    def _pause_after(self, count: int) -> float:
        if self._pause is not None:
            return self._pause
        timings = self._timings
        return timings.after_notification if count == 1 else timings.after_notifications

    async def _try_to_send(self, channel: str, ids: Collection[Any]) -> None:
        told = ids if len(ids) <= self._timings.max_pending_notifications else ()
        try:
            await self.send(channel, pack([str(task_id) for task_id in told]))
        except TaskiqSaPgError as exc:
            logger.warning("waiters will notice %d results or tasks late: %s", len(ids), exc)


def pack(ids: Sequence[str]) -> list[str]:
    """Payloads that tell of these ids."""
    if sum(map(len, ids)) + 3 * len(ids) <= _MAX_PAYLOAD_BYTES:  # else there is no need to try
        payload = _to_json(ids)
        if len(payload.encode()) <= _MAX_PAYLOAD_BYTES:
            return [payload]
    if len(ids) == 1:
        return ["[]"]
    middle = len(ids) // 2
    return [*pack(ids[:middle]), *pack(ids[middle:])]


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
