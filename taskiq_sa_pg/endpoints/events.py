"""Server-sent events: their encoding, and when a stream ends."""

import asyncio
import logging
import re
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from taskiq_sa_pg.background import end_task
from taskiq_sa_pg.exceptions import NotStartedError, StorageError

logger = logging.getLogger(__name__)

DEFAULT_HEARTBEAT: Final = 15.0

FindEnd = Callable[[], Awaitable[bytes | None]]

_RETRY: Final = b"retry: 3000\n\n"  # milliseconds
_HEARTBEAT: Final = b":\n\n"
_LINE_END: Final = re.compile(r"\r\n|\r|\n")
_BETWEEN_LOOKS: Final = 0.5


def encode_event(name: str, data: str, *, event_id: str | None = None) -> bytes:
    """Returns the bytes of an event; its data may have several lines."""
    lines = [f"event: {name}"]
    if event_id is not None:
        lines.append(f"id: {event_id}")
    lines += [f"data: {line}" for line in _LINE_END.split(data)]
    return ("\n".join(lines) + "\n\n").encode(errors="replace")


async def keep_open(
    events: AsyncGenerator[bytes, None],
    heartbeat: float = DEFAULT_HEARTBEAT,
    find_end: FindEnd | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yields the bytes of a stream of events, with comments while there are no events.

    It ends with the events, when uvicorn stops, when the backend is shut down, or when PostgreSQL
    is unreachable, which is logged. Closing it closes the events.

    Args:
        events: Events from encode_event().
        heartbeat: Seconds without an event before a comment is sent, so that proxies keep the
            connection open.
        find_end: Called before a comment; returns the last event if there will be no more.
    """
    upcoming: asyncio.Task[bytes | None] | None = None
    try:
        yield _RETRY
        with _server_stopping() as stopping:
            while True:
                if upcoming is None:
                    upcoming = asyncio.create_task(_next(events))
                awaited: tuple[asyncio.Future[Any], ...] = (upcoming, stopping)
                await asyncio.wait(awaited, timeout=heartbeat, return_when=asyncio.FIRST_COMPLETED)
                if upcoming.done():
                    event, upcoming = upcoming.result(), None
                    if event is None:
                        return
                    yield event
                elif stopping.done():
                    return
                elif find_end is not None and (end := await find_end()) is not None:
                    yield end
                    return
                else:
                    yield _HEARTBEAT
    except NotStartedError:
        return
    except StorageError as exc:
        logger.error("a stream of events ended: %s", exc)  # noqa: TRY400 - the text is enough
    finally:
        await end_task(upcoming)
        if upcoming is not None and not upcoming.cancelled():
            upcoming.exception()  # retrieved, or asyncio would log it
        await events.aclose()


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


@contextmanager
def _server_stopping() -> Iterator[asyncio.Future[None]]:
    """A future that is done soon after uvicorn received a signal to stop.

    uvicorn waits for all responses to end, and does not notify them. Without this, one open page
    would prevent it from stopping or reloading.
    """
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()
    timers: list[asyncio.TimerHandle] = []

    def look() -> None:
        if not _is_server_stopping():
            timers[:] = [loop.call_later(_BETWEEN_LOOKS, look)]
        elif not stopping.done():
            stopping.set_result(None)

    look()
    try:
        yield stopping
    finally:
        for timer in timers:
            timer.cancel()
        stopping.cancel()


def _is_server_stopping() -> bool:
    # uvicorn's signal handler is a method of its server, which has the attribute should_exit.
    handler = signal.getsignal(signal.SIGTERM)
    return getattr(getattr(handler, "__self__", None), "should_exit", None) is True


class EventResponse(Response):
    """A response of server-sent events, which ends when the client disconnects.

    Args:
        events: Events from encode_event(); always closed at the end.
        heartbeat, find_end: As in keep_open().
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None] | None = None,
        *,
        heartbeat: float = DEFAULT_HEARTBEAT,
        find_end: FindEnd | None = None,
    ) -> None:
        # X-Accel-Buffering is for nginx, which would buffer the events.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._events = keep_open(_nothing() if events is None else events, heartbeat, find_end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response, as an ASGI application."""
        # With newer servers, Starlette's own response notices a disconnect only at the next event.
        tasks = [asyncio.create_task(self._send(send)), asyncio.create_task(_leave(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()
        if self.background is not None:
            await self.background()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        is_open = await _sent(send, start)
        while is_open:
            event = await anext(self._events, b"")
            body = {"type": "http.response.body", "body": event, "more_body": event != b""}
            is_open = await _sent(send, body) and event != b""


async def _sent(send: Send, message: Message) -> bool:
    try:
        await send(message)
    except OSError:  # newer servers raise it if the client has disconnected
        return False
    return True


async def _leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield b""
