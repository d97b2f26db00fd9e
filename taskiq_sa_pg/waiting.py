"""Who waits for which task: woken by notifications, and by a look at the table now and then.

A notification is a hint that may be missing, late or repeated; only the table says that a result
is there. So everybody who is woken looks, and whatever was stored without a notification is found
by the look that is made for all who wait.
"""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any, Final, NamedTuple

from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.exceptions import NotStartedError
from taskiq_sa_pg.listener import Listener, end
from taskiq_sa_pg.notifications import Notifier
from taskiq_sa_pg.polls import Polls
from taskiq_sa_pg.telemetry import ListenerState

logger = logging.getLogger(__name__)

# What is stored without a notification is noticed this late at most.
_SECONDS_BETWEEN_LOOKS: Final = 3.0

# The same where nothing can be heard; taskiq's own waiting takes 0.2.
_SECONDS_UNHEARD: Final = 0.1

# Whatever asks for looks, they come no faster than this.
_LEAST_SECONDS_BETWEEN_LOOKS: Final = 0.02

# How long the finding of a look is good for: until the next one is over.
_MAX_AGE: Final = _SECONDS_BETWEEN_LOOKS + 1


class Topic(NamedTuple):
    """What can be waited for: a row of a table, whose notifications come on its channel."""

    channel: str
    task_id: str


class Subscription:
    """Topics of which somebody wants to hear."""

    def __init__(self, topics: Iterable[Topic]) -> None:
        self.topics: Final = frozenset(topics)
        self._woken: set[Topic] = set()
        self._wakeup: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_closed = False

    def wake(self, topics: Iterable[Topic]) -> None:
        """Tells of topics."""
        self._woken.update(topics)
        if not self._wakeup.done():
            self._wakeup.set_result(None)

    def close(self) -> None:
        """Ends the waiting."""
        self._is_closed = True
        self.wake(())

    async def woken(self) -> set[Topic]:
        """The topics that were told of since the last time; waits for one.

        Raises:
            NotStartedError: The backend was shut down.
        """
        await self._wakeup
        if self._is_closed:
            raise NotStartedError("the result backend was shut down while this waited")
        self._wakeup = asyncio.get_running_loop().create_future()
        woken, self._woken = self._woken, set()
        return woken


class Waiting:
    """Wakes those who wait for the tasks of one results table.

    Nothing is asked and no connection is opened before somebody waits.

    Args:
        config: The tables.
        find_ready: Which of these ids, as the column has them, have a result, by one look.
        connect: Opens a connection for listening.
        notifier: Sends notifications as the writers do; None never listens.
    """

    def __init__(
        self,
        config: TableConfig,
        find_ready: Callable[[Iterable[Any]], Awaitable[set[Any]]],
        connect: Callable[[], AbstractAsyncContextManager[Any]],
        notifier: Notifier | None,
    ) -> None:
        self._to_column_task_id = config.to_column_task_id
        self._results_channel = config.results_channel
        self._progress_channel = config.progress_channel
        self._find_ready = find_ready
        self._listener: Listener | None = None
        if notifier is not None:
            self._listener = Listener(
                connect,
                (config.results_channel, config.progress_channel),
                send=notifier.send,
                hear=self._hear,
                on_healthy=self._look_at_once,
            )
        self._subscriptions: defaultdict[Topic, set[Subscription]] = defaultdict(set)
        self.waiters = 0
        self._polls = Polls()
        self._looker: asyncio.Task[None] | None = None
        self._is_look_due = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._is_warned = False
        self._is_closed = False

    @property
    def listener_state(self) -> ListenerState:
        """What is known of the listening connection."""
        return "off" if self._listener is None else self._listener.state

    @contextmanager
    def subscribe(self, topics: Iterable[Topic]) -> Iterator[Subscription]:
        """Hears of these topics from now on; what is there already has to be looked for.

        Raises:
            NotStartedError: After close().
        """
        if self._is_closed:
            raise NotStartedError("the result backend was shut down: call startup() again")
        subscription = Subscription(topics)
        self.waiters += 1
        for topic in subscription.topics:
            self._subscriptions[topic].add(subscription)
        self._start()
        try:
            yield subscription
        finally:
            self.waiters -= 1
            for topic in subscription.topics:
                self._subscriptions[topic].discard(subscription)
                if not self._subscriptions[topic]:
                    del self._subscriptions[topic]

    async def is_ready(self, task_id: str, look: Callable[[], Awaitable[bool]]) -> bool:
        """Answers a poll: from memory while it is known that there is no result, else by a look."""
        if self._listener is None:
            return await look()
        now = self._loop.time()
        if self._polls.is_repeated(task_id, now):
            self._start()
            if self._listener.is_healthy and self._polls.is_missing_since(task_id, now - _MAX_AGE):
                return False
        began_at = self._loop.time()
        is_ready = await look()
        if is_ready:
            self._polls.forget(task_id)
        else:
            self._polls.note_missing([task_id], began_at)
        return is_ready

    async def close(self) -> None:
        """Ends all waiting, with an error."""
        self._is_closed = True
        looker, self._looker = self._looker, None
        if looker is not None:
            await end(looker)
        if self._listener is not None:
            await self._listener.stop()
        for subscription in set().union(*self._subscriptions.values()):
            subscription.close()

    def _start(self) -> None:
        if self._listener is not None:
            self._listener.start()
        if self._looker is None or self._looker.done():
            self._looker = asyncio.create_task(self._look_regularly())

    def _hear(self, channel: str, payload: str) -> None:
        try:
            task_ids = [str(task_id) for task_id in json.loads(payload)]
        except (ValueError, TypeError, RecursionError):
            task_ids = []  # anybody may send anything
        if not task_ids:
            self._is_look_due.set()
        for task_id in task_ids:
            self._wake(Topic(channel, task_id))

    def _wake(self, topic: Topic) -> None:
        if topic.channel == self._results_channel:
            self._polls.doubt(topic.task_id, self._loop.time())
        for subscription in self._subscriptions.get(topic, ()):
            subscription.wake([topic])

    def _look_at_once(self) -> None:
        # Whatever was notified until now may have been missed.
        self._polls.doubt_all(self._loop.time())
        self._is_look_due.set()

    async def _look_regularly(self) -> None:
        while self._subscriptions or self._polls.repeated(self._loop.time()):
            try:
                await self._look()
            except Exception as exc:  # noqa: BLE001 - those who wait need the next look
                self._warn(exc)
            else:
                self._is_warned = False
            await asyncio.sleep(_LEAST_SECONDS_BETWEEN_LOOKS)
            is_heard = self._listener is not None and self._listener.is_healthy
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    _SECONDS_BETWEEN_LOOKS if is_heard else _SECONDS_UNHEARD
                ):
                    await self._is_look_due.wait()
            self._is_look_due.clear()

    async def _look(self) -> None:
        began_at = self._loop.time()
        waited_for = {t.task_id for t in self._subscriptions if t.channel == self._results_channel}
        asked = waited_for | self._polls.repeated(began_at)
        if asked:
            ready = set(map(str, await self._find_ready(map(self._to_column_task_id, asked))))
            self._polls.note_missing(asked - ready, began_at)
            for task_id in ready:
                self._wake(Topic(self._results_channel, task_id))
        # Who follows progress reads it for himself, together with all the others.
        for topic in [t for t in self._subscriptions if t.channel == self._progress_channel]:
            self._wake(topic)

    def _warn(self, exc: Exception) -> None:
        if not self._is_warned:
            logger.warning("those who wait for results have to wait: %s", exc)
        self._is_warned = True
