"""A TCP proxy between the library and a server that cuts, delays and swallows."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

_CHUNK = 65_536


class Proxy:
    """Passes bytes on, unless it is told otherwise.

    Attributes:
        is_silent: Takes bytes and passes none on, on connections that are open and on new ones.
        delay: Seconds for which every piece is held back.
        most_connections: That were open at once.
        watch: Called with each piece that a client sends, before it is passed on; what it returns
            decides: False loses the answer, cutting the connection once the server has answered.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.is_silent = False
        self.delay = 0.0
        self.most_connections = 0
        self.watch: Callable[[bytes], bool] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def refuse(self) -> None:
        """Resets every connection and listens no more, until open(port)."""
        if self._server is not None:
            self._server.close()
        self.cut()

    async def close(self) -> None:
        await self.refuse()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.most_connections = max(self.most_connections, len(self._tasks))
        self._writers.add(writer)
        server_writer = None
        try:
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self.target_port
            )
            self._writers.add(server_writer)
            is_answer_lost = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, server_writer, is_answer_lost, is_up=True))
                group.create_task(self._pass_on(server_reader, writer, is_answer_lost))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, server_writer):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()
            self._tasks.discard(task)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_answer_lost: asyncio.Event,
        *,
        is_up: bool = False,
    ) -> None:
        while piece := await reader.read(_CHUNK):
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.is_silent:
                continue
            if is_up and self.watch is not None and not self.watch(piece):
                is_answer_lost.set()
            if not is_up and is_answer_lost.is_set():
                break
            writer.write(piece)
            with suppress(ConnectionError):
                await writer.drain()
        raise ConnectionResetError


@asynccontextmanager
async def proxied(target_port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(target_port)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()


class LoseOnce:
    """For Proxy.watch: the answer to the first piece of which something is true is lost."""

    def __init__(self, is_it: Callable[[bytes], bool]) -> None:
        self._is_it = is_it
        self.has_lost = False

    def __call__(self, piece: bytes) -> bool:
        if self.has_lost or not self._is_it(piece):
            return True
        self.has_lost = True
        return False
