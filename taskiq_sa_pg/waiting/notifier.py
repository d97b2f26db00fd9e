"""Notifies waiting clients of stored rows, with PostgreSQL's notifications.

A notification is a hint; only the table is authoritative. A payload is a JSON array of task ids. An
empty one stands for ids that do not fit in a payload: then all waiting clients check the table.
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
    """Sends notifications in the background, after the rows were committed.

    They are sent in separate statements: otherwise the lock that a notification takes would
    serialize all commits of results.

    Args:
        database: The database.
        timings: The pauses after notifications, in which the next ones gather.
        pause: A fixed pause in seconds, instead of those.
    """

    def __init__(self, database: Database, timings: Timings, pause: float | None = None) -> None:
        self._database = database
        self._timings = timings
        self._pause = pause
        self._statement = notify()
        self._pending: dict[str, dict[Any, None]] = {}  # the distinct ids by channel
        self._task: asyncio.Task[None] | None = None

    def announce(self, channel: str, ids: Iterable[Any]) -> None:
        """Notifies of rows that were stored."""
        pending = self._pending.setdefault(channel, {})
        if len(pending) <= self._timings.max_pending_notifications:
            pending.update(dict.fromkeys(ids))
        self._start()

    async def send(self, channel: str, payloads: list[str]) -> bool:
        """Sends payloads now; returns whether through listen_dsn, because of a read replica.

        Raises:
            StorageError: They could not be sent.
        """
        parameters = {"channel": channel, "payloads": payloads}
        purpose = f"send notifications on channel {channel}"
        # Not retried: they are hints, and listeners check the table after an outage.
        sent = await self._database.fetch(self._statement, parameters, purpose, retry_timeout=0)
        if not sent:
            await self._database.fetch_by_listen_dsn(self._statement, parameters, purpose)
        return not sent

    async def close(self) -> None:
        """Returns when all has been sent."""
        while self._pending or is_running(self._task):
            self._start()  # the application may have cancelled it with all other tasks
            assert self._task is not None
            await asyncio.wait([self._task])

    def _start(self) -> None:
        if not is_running(self._task):
            self._task = start_task(self._send_pending())

    async def _send_pending(self) -> None:
        while self._pending:
            await asyncio.sleep(0)  # callers whose results are stored continue first
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
        named = ids if len(ids) <= self._timings.max_pending_notifications else ()
        try:
            await self.send(channel, pack([str(task_id) for task_id in named]))
        except TaskiqSaPgError as exc:
            logger.warning(
                "waiting clients will find %d results or tasks later, by polling: %s",
                *(len(ids), exc),
            )


def pack(ids: Sequence[str]) -> list[str]:
    """The payloads for these ids."""
    if sum(map(len, ids)) + 3 * len(ids) <= _MAX_PAYLOAD_BYTES:  # otherwise certainly too long
        payload = _to_json(ids)
        if len(payload.encode()) <= _MAX_PAYLOAD_BYTES:
            return [payload]
    if len(ids) == 1:
        return ["[]"]
    middle = len(ids) // 2
    return [*pack(ids[:middle]), *pack(ids[middle:])]


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
