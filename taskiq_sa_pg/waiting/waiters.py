"""The waiting clients: woken by notifications, and by polling the table.

A notification is a hint that may be missing, late or repeated; only the table is authoritative. So
a client that is woken checks the table. Rows without a notification are found by polling, with one
query for all waiting clients.
"""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

from taskiq_sa_pg.background import end_task, is_running, start_task
from taskiq_sa_pg.exceptions import NotStartedError
from taskiq_sa_pg.models import TableConfig
from taskiq_sa_pg.telemetry import ListenerState
from taskiq_sa_pg.timings import Timings
from taskiq_sa_pg.waiting.listener import Listener

logger = logging.getLogger(__name__)


class Topic(NamedTuple):
    """A row that a client can wait for, and the channel of its notifications."""

    channel: str
    task_id: str


class Subscription:
    """The topics of a waiting client.

    Attributes:
        is_awaited: Whether the client has checked the table and now waits.
    """

    def __init__(self, topics: Iterable[Topic]) -> None:
        self.topics: Final = frozenset(topics)
        self._woken: set[Topic] = set()
        self.is_awaited = False
        self._wakeup: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_closed = False

    def wake(self, topics: Iterable[Topic]) -> None:
        """Wakes the client with these topics."""
        self._woken.update(topics)
        if not self._wakeup.done():
            self._wakeup.set_result(None)

    def close(self) -> None:
        """Ends the waiting with an error."""
        self._is_closed = True
        self.wake(())

    async def woken(self) -> set[Topic]:
        """Waits until topics were woken, and returns all since the last call.

        Raises:
            NotStartedError: The backend was shut down.
        """
        self.is_awaited = True
        try:
            await self._wakeup
        finally:
            self.is_awaited = False
        if self._is_closed:
            raise NotStartedError("the result backend was shut down while this waited")
        self._wakeup = asyncio.get_running_loop().create_future()
        woken, self._woken = self._woken, set()
        return woken


class Waiters:
    """Wakes the clients that wait for tasks of one results table.

    It does not query or connect before the first client waits.

    Args:
        config: The tables.
        find_ready: Returns those of the given ids that have a result, in one query.
        listener: Receives notifications, started with the first client; None never listens.
        timings: The polling intervals.

    Attributes:
        listener: The same.
        waiting: The number of waiting clients.
    """

    def __init__(
        self,
        config: TableConfig,
        find_ready: Callable[[Collection[Any]], Awaitable[set[Any]]],
        listener: Listener | None,
        timings: Timings,
    ) -> None:
        self._config = config
        self._find_ready = find_ready
        self._timings = timings
        self.listener: Final = listener
        if listener is not None:
            channels = config.results_channel, config.progress_channel
            listener.add(channels, self.hear, self._look_at_once)
        self._subscriptions: defaultdict[Topic, set[Subscription]] = defaultdict(set)
        self.waiting = 0
        self._looker: asyncio.Task[None] | None = None
        self._is_look_due = asyncio.Event()
        self._expected: dict[Topic, float] = {}  # notified topics, and until when to poll for them
        self._expecter: asyncio.Task[None] | None = None
        self._until_next_look = 0.0  # seconds between these polls; grows until a new notification
        self._is_warned = False
        self._is_closed = False

    @property
    def listener_state(self) -> ListenerState:
        """The state of the LISTEN connection."""
        return "off" if self.listener is None else self.listener.state

    @property
    def subscriptions(self) -> set[Subscription]:
        """The waiting clients."""
        return set().union(*self._subscriptions.values())

    def result_topic(self, column_id: Any) -> Topic:
        """The topic of a task's result."""
        return Topic(self._config.results_channel, str(column_id))

    def progress_topic(self, column_id: Any) -> Topic:
        """The topic of a task's progress."""
        return Topic(self._config.progress_channel, str(column_id))

    @contextmanager
    def subscribe(self, topics: Iterable[Topic]) -> Iterator[Subscription]:
        """Subscribes to topics from now on; the caller has to check for existing rows.

        Raises:
            NotStartedError: After close().
        """
        if self._is_closed:
            raise NotStartedError("the result backend was shut down: call startup() again")
        subscription = Subscription(topics)
        self.waiting += 1
        for topic in subscription.topics:
            self._subscriptions[topic].add(subscription)
        if self.listener is not None:
            self.listener.start()
        if not is_running(self._looker):
            self._looker = start_task(self._look_regularly())
        try:
            yield subscription
        finally:
            self.waiting -= 1
            for topic in subscription.topics:
                self._subscriptions[topic].discard(subscription)
                if not self._subscriptions[topic]:
                    del self._subscriptions[topic]
                    _ = self._expected.pop(topic, None)

    async def close(self) -> None:
        """Ends all waiting with an error."""
        self._is_closed = True
        for task in (self._looker, self._expecter):
            await end_task(task)
        self._looker = self._expecter = None
        for subscription in self.subscriptions:
            subscription.close()

    def hear(self, channel: str, payload: str) -> None:
        """Handles a notification."""
        try:
            task_ids = [str(task_id) for task_id in json.loads(payload)]
        except (ValueError, TypeError, RecursionError):
            task_ids = []  # other programs may send anything
        if not task_ids:
            self._is_look_due.set()
        topics = [Topic(channel, task_id) for task_id in task_ids]
        for topic in topics:
            self._wake(topic)
        if self.listener is not None and self.listener.is_ahead:
            self._expect(topics or list(self._subscriptions))

    def _expect(self, topics: Iterable[Topic]) -> None:
        """Wakes clients repeatedly for a while, because the replica that they read lags behind."""
        until = asyncio.get_running_loop().time() + self._timings.between_looks
        self._expected.update((topic, until) for topic in topics if topic in self._subscriptions)
        self._until_next_look = self._timings.between_any_looks
        if self._expected and not is_running(self._expecter):
            self._expecter = start_task(self._wake_expectant())

    async def _wake_expectant(self) -> None:
        while self._expected:
            pause = self._until_next_look
            self._until_next_look = min(2 * pause, self._timings.between_unheard_looks)
            await asyncio.sleep(pause)
            now = asyncio.get_running_loop().time()
            for topic, until in list(self._expected.items()):
                self._wake(topic)
                if until < now:
                    del self._expected[topic]

    def _wake(self, topic: Topic) -> None:
        for subscription in self._subscriptions.get(topic, ()):
            subscription.wake([topic])

    def _look_at_once(self) -> None:
        # Notifications until now may have been lost.
        self._is_look_due.set()

    async def _look_regularly(self) -> None:
        timings = self._timings
        while self._subscriptions:
            try:
                await self.look()
            except Exception as exc:  # noqa: BLE001 - waiting clients need the next poll
                self._warn(exc)
            else:
                self._is_warned = False
            await asyncio.sleep(timings.between_any_looks)
            is_heard = self.listener is not None and self.listener.is_healthy
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    timings.between_looks if is_heard else timings.between_unheard_looks
                ):
                    await self._is_look_due.wait()
            self._is_look_due.clear()

    async def look(self) -> None:
        """Polls once, for all waiting clients."""
        topics = list(self._subscriptions)
        asked = {t.task_id for t in topics if t.channel == self._config.results_channel}
        if asked:
            column_ids = list(map(self._config.to_column_task_id, asked))
            for task_id in await self._find_ready(column_ids):
                self._wake(self.result_topic(task_id))
        # Clients that watch progress read it themselves, batched with all others.
        for topic in topics:
            if topic.channel == self._config.progress_channel:
                self._wake(topic)

    def _warn(self, exc: Exception) -> None:
        if not self._is_warned:
            logger.warning("polling for results failed, waiting clients keep waiting: %s", exc)
        self._is_warned = True
