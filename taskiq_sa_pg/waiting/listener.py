"""The LISTEN connection: receives notifications, verifies that they arrive, and reconnects."""

import asyncio
import json
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from taskiq_sa_pg.background import end_task, is_running, start_task
from taskiq_sa_pg.database import READ_ONLY
from taskiq_sa_pg.exceptions import StorageError
from taskiq_sa_pg.telemetry import ListenerState
from taskiq_sa_pg.timings import Timings

logger = logging.getLogger(__name__)

_Hear = Callable[[str, str], None]


class Listener:
    """Receives the notifications of all added channels, on one connection.

    To check the connection, it sends probes to itself in the same way as writers. It is healthy
    from the first probe that arrives until the connection is lost or a later probe does not arrive
    in time. Behind a transaction pooler, which accepts LISTEN and delivers nothing, it is never
    healthy.

    Args:
        connect: Opens the driver's connection.
        send: Sends payloads to a channel in the same way as writers. If that is a read replica, it
            sends them to the server of the LISTEN connection instead, and returns True.
        timings: The times between probes and before reconnecting.

    Attributes:
        is_healthy: Whether notifications arrive.
        is_ahead: Whether rows are read from a replica, which gets them after the notification.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Any]],
        *,
        send: Callable[[str, list[str]], Awaitable[bool]],
        timings: Timings,
    ) -> None:
        self._connect = connect
        self._send = send
        self._timings = timings
        # By channel; probes are sent to the first.
        self._hear: dict[str, dict[_Hear, Callable[[], None]]] = {}
        self._has_more = asyncio.Event()
        # The last two probes: the first may still be on its way. A pooled connection may also
        # receive probes that were sent before its LISTEN.
        self.probes: deque[str] = deque(maxlen=2)
        self._task: asyncio.Task[None] | None = None
        self._limit: asyncio.Timeout | None = None
        self._is_warned = False
        self._is_stopped = False
        self._is_at_replica = False  # a read replica has no notifications
        self.is_healthy = self.is_ahead = False

    @property
    def state(self) -> ListenerState:
        """The state: listening, connecting, idle (nobody waits) or replica."""
        if self.is_healthy:
            return "listening"
        if not is_running(self._task):
            return "idle"
        return "replica" if self._is_at_replica else "connecting"

    def add(self, channels: Iterable[str], hear: _Hear, on_healthy: Callable[[], None]) -> None:
        """Adds channels; if new ones are among them, an open connection is replaced.

        Args:
            channels: The channels.
            hear: Called with channel and payload of every notification that is not a probe.
            on_healthy: Called each time it becomes healthy. Earlier notifications may be lost.
        """
        for channel in channels:
            if channel not in self._hear:
                self._hear[channel] = {}
                self._has_more.set()
            self._hear[channel][hear] = on_healthy

    def remove(self, channels: Iterable[str], hear: _Hear) -> None:
        """Removes a callback from channels; the connection stays open."""
        for channel in channels:
            _ = self._hear[channel].pop(hear, None)

    def start(self) -> None:
        """Starts listening, unless it already does or was stopped."""
        if not is_running(self._task) and not self._is_stopped:
            self._task = start_task(self._run())

    async def stop(self) -> None:
        """Closes the connection permanently."""
        self._is_stopped = True
        task, self._task = self._task, None
        await end_task(task)

    async def _run(self) -> None:
        first, last = self._timings.first_reconnect, self._timings.last_reconnect
        retry_after = first
        while True:
            is_at_replica = False
            try:
                async with self._connect() as driver:
                    reason = await self._listen(driver)
            except Exception as exc:  # noqa: BLE001 - after any error, another attempt may succeed
                reason = str(exc) or type(exc).__name__
                is_at_replica = isinstance(exc, StorageError) and exc.sqlstate == READ_ONLY
            finally:
                was_healthy, self.is_healthy = self.is_healthy, False
            self._is_at_replica = is_at_replica
            retry_after = first if was_healthy else retry_after * 2
            if reason:
                self._warn(reason)
                await asyncio.sleep(min(retry_after, last))

    def _warn(self, reason: str) -> None:
        if self._is_warned:
            logger.debug("still not listening for results: %s", reason)
            return
        self._is_warned = True
        if self._is_at_replica:
            logger.warning(
                "%s: results are polled ten times a second. For notifications, set listen_dsn= to "
                "the primary's address. A worker needs the primary as its dsn=",
                reason,
            )
            return
        logger.warning(
            "not listening for results and tasks, so they are polled at intervals: %s. Connecting "
            "is retried. Behind a transaction pooler, set listen_dsn= to the server's own address, "
            "or notify=False",
            reason,
        )

    async def _listen(self, driver: Any) -> str:
        """Listens until the connection is lost or silent, or until channels are added.

        Returns:
            Why the connection cannot be used; empty if there are new channels.
        """
        is_asyncpg = hasattr(driver, "add_listener")
        listen = _listen_with_asyncpg if is_asyncpg else _listen_with_psycopg
        tasks: list[asyncio.Task[Any]] = []
        self.probes.clear()
        self._has_more.clear()
        channels = list(self._hear)
        try:
            async with asyncio.timeout(self._timings.between_probes) as self._limit:
                receive = await listen(driver, channels, self._receive)
                lost, more = start_task(receive), start_task(self._has_more.wait())
                tasks += lost, more, start_task(self._send_probes(channels[0]))
                _ = await asyncio.wait([lost, more], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            return "the connection delivers no notifications, or the event loop was blocked"
        finally:
            self._limit = None
            for task in tasks:
                await end_task(task)
        if lost.done():
            lost.result()
            return "the connection was lost"
        return ""

    async def _send_probes(self, channel: str) -> None:
        while True:
            self.probes.append(json.dumps({"probe": uuid.uuid4().hex}))
            try:
                self.is_ahead = await self._send(channel, [self.probes[-1]])
            except StorageError as exc:
                # If probes keep failing, the time limit expires.
                logger.debug("could not send a probe: %s", exc)
            await asyncio.sleep(self._timings.between_probes)

    def _receive(self, channel: str, payload: str) -> None:
        if payload in self.probes:
            self._prove()
        elif not payload.startswith("{"):  # else another process's probe
            for hear in list(self._hear[channel]):
                hear(channel, payload)

    def _prove(self) -> None:
        if self._limit is None or self._limit.expired():
            return  # too late: the event loop was blocked
        now = asyncio.get_running_loop().time()
        self._limit.reschedule(now + 2 * self._timings.between_probes)
        if self.is_healthy:
            return
        self.is_healthy = True
        if self._is_warned:
            self._is_warned = False
            logger.info("listening for results again")
        for on_healthy in {each for added in self._hear.values() for each in added.values()}:
            on_healthy()


async def _listen_with_asyncpg(
    driver: Any, channels: Sequence[str], receive: _Hear
) -> Coroutine[Any, Any, None]:
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_termination(_connection: Any) -> None:
        if not lost.done():
            lost.set_result(None)

    def on_notification(_connection: Any, _pid: int, channel: str, payload: str) -> None:
        receive(channel, payload)

    driver.add_termination_listener(on_termination)
    for channel in channels:
        await driver.add_listener(channel, on_notification)

    async def wait_for_loss() -> None:
        await lost

    return wait_for_loss()


async def _listen_with_psycopg(
    driver: Any, channels: Sequence[str], receive: _Hear
) -> Coroutine[Any, Any, None]:
    from psycopg.sql import SQL, Identifier  # noqa: PLC0415 - psycopg is an extra

    for channel in channels:
        await driver.execute(SQL("LISTEN {}").format(Identifier(channel)))

    async def receive_all() -> None:
        async for notification in driver.notifies():
            receive(notification.channel, notification.payload)

    return receive_all()
