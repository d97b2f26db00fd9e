"""The broker's runtime, between startup() and shutdown()."""

import asyncio
import json
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, Final

from taskiq_sa_pg.broker.admin import QueueAdmin
from taskiq_sa_pg.broker.claims import Claims
from taskiq_sa_pg.broker.consumer import Consumer
from taskiq_sa_pg.broker.sender import Sender
from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.broker.ticks import Tick, TickSender
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.schema import QUEUE, check_queue, prepare
from taskiq_sa_pg.statements import Claimed, QueueRow
from taskiq_sa_pg.waiting import Listener, Notifier


class QueueRuntime:
    """All components of the broker, for one event loop.

    Args:
        settings: The broker's settings.
        database: The queue's database.
        listener: The result backend's listener, which it does not stop; None creates one.
    """

    def __init__(
        self,
        settings: QueueSettings,
        database: Database,
        listener: Listener | None,
    ) -> None:
        self.loop: Final = asyncio.get_running_loop()
        self.settings: Final = settings
        self.database: Final = database
        timings, notify = settings.timings, settings.notify
        self.notifier: Final = Notifier(database, timings, timings.after_hint) if notify else None
        self._is_shared = listener is not None
        if listener is None and self.notifier is not None:
            listener = Listener(database.listening, send=self.notifier.send, timings=timings)
        self.listener: Final = listener if notify else None
        self.claims: Final = Claims(settings, database)
        self._sender = Sender(settings, database, self.announce)
        self._ticks = TickSender(settings, database, self.announce)
        self._channel = settings.models.config.queue_channel
        self._consumers: dict[Consumer, frozenset[str]] = {}
        if self.listener is not None:
            self.listener.add([self._channel], self._hear, self._wake_all)

    async def send(self, row: QueueRow) -> None:
        """Stores a task; it is committed on return."""
        replaced = self.claims.held(row.task_id)
        await self._sender.send(row)
        if replaced is not None:
            # Only the old claim: a newer one may be of the message that was just sent.
            self.claims.drop([replaced])

    async def send_for_tick(self, tick: Tick, row: QueueRow) -> None:
        """Stores the task of a schedule unless another scheduler did; it is committed on return."""
        replaced = self.claims.held(row.task_id)
        if await self._ticks.send(tick, row) and replaced is not None:
            self.claims.drop([replaced])

    def note_sent(self, rows: Collection[QueueRow]) -> None:
        """Notifies workers of tasks that a session has committed; from any thread."""
        with suppress(RuntimeError):  # the event loop has ended: workers find them by polling
            self.loop.call_soon_threadsafe(self.announce, {row.queue_name for row in rows})

    def announce(self, queue_names: Collection[str]) -> None:
        """Notifies workers that queues have due tasks; it returns at once."""
        if self.notifier is not None:
            self.notifier.announce(self._channel, queue_names)

    @cached_property
    def admin(self) -> QueueAdmin:
        """The administration of the queue."""
        return QueueAdmin(self.settings, self.database, self.announce)

    def consume(
        self,
        queue_names: Sequence[str],
        *,
        worker: str,
        is_known: Callable[[str], bool],
        abandon: Callable[[Claimed], Coroutine[Any, Any, None]],
    ) -> Consumer:
        """Creates a consumer of some queues; stop() ends it."""
        consumer = Consumer(
            self.settings,
            self.database,
            self.claims,
            self.listener,
            queue_names=queue_names,
            worker=worker,
            is_known=is_known,
            abandon=abandon,
            announce=partial(self.announce, frozenset(queue_names)),
        )
        if self.listener is not None:
            self.listener.start()
        self._consumers[consumer] = frozenset(queue_names)
        return consumer

    async def stop(self, consumer: Consumer) -> None:
        """Ends a consumer; may be repeated."""
        _ = self._consumers.pop(consumer, None)
        await consumer.stop()

    async def prepare(self) -> None:
        """Creates or checks the tables, according to the settings.

        Raises:
            SchemaError: The tables are missing or do not match, or cannot be created.
            StorageError: PostgreSQL cannot be reached.
        """
        settings, database = self.settings, self.database
        await prepare(
            database,
            settings.models.config,
            QUEUE,
            lambda: check_queue(
                database,
                settings.models,
                settings.startup_timeout,
                is_provisioned=settings.run_migrations,
            ),
            run_migrations=settings.run_migrations,
            check_schema=settings.check_schema,
            timeout=settings.startup_timeout,
            timings=settings.timings,
        )

    async def close(self) -> None:
        """Releases unacknowledged tasks, and returns when all pending work is done."""
        # First: if the rest, which may wait for PostgreSQL, is cancelled, it would never stop.
        if self.listener is not None:
            self.listener.remove([self._channel], self._hear)
            if not self._is_shared:
                await self.listener.stop()
        for consumer in list(self._consumers):
            await self.stop(consumer)
        await self.claims.close()
        await self._sender.close()
        if self.notifier is not None:
            await self.notifier.close()

    def _hear(self, _channel: str, payload: str) -> None:
        try:
            names = {str(name) for name in json.loads(payload)}
        except (ValueError, TypeError, RecursionError):
            names = set()  # other programs may send anything
        for consumer, wanted in self._consumers.items():
            if not names or names & wanted:
                consumer.wake()

    def _wake_all(self) -> None:
        for consumer in self._consumers:
            consumer.wake()
