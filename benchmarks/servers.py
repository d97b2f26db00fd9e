"""The servers that the backends use, and what the servers know of their clients."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import asyncpg
from redis.asyncio import Redis

from benchmarks.contenders import CONTENDERS, Contender

# PostgreSQL is as durable as in production.
DURABLE: Final = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
# Counting statements takes time, so nothing else is measured on such a server.
COUNTING: Final = DURABLE | {"shared_preload_libraries": "pg_stat_statements"}

_COUNT_CONNECTIONS: Final = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
_COUNT_STATEMENTS: Final = (
    "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements "
    "WHERE query NOT LIKE '%pg_stat_%'"
)


@dataclass(frozen=True, slots=True)
class PostgresServer:
    address: str
    connection: asyncpg.Connection

    async def count_connections(self, client: str) -> int:
        """How many connections the backend has that was started under this name."""
        count: int = await self.connection.fetchval(_COUNT_CONNECTIONS, client)
        return count

    async def count_statements(self) -> int:
        """How many statements of others the server has run; it has to be a COUNTING one."""
        count: int = await self.connection.fetchval(_COUNT_STATEMENTS)
        return count

    async def cpu_seconds(self) -> float:
        """What all processes of the server have used; it runs on this machine, a Linux."""
        backend: int = await self.connection.fetchval("SELECT pg_backend_pid()")
        return _cpu_seconds_of_family(_Process.read(backend).parent)

    async def empty(self, table: str) -> None:
        await self.connection.execute(f"TRUNCATE {table}")


@dataclass(frozen=True, slots=True)
class RedisServer:
    """As PostgresServer, for one backend at a time."""

    address: str
    connection: Redis

    async def count_connections(self, _client: str) -> int:
        return int((await self.connection.info("clients"))["connected_clients"]) - 1  # ours

    async def count_statements(self) -> int:
        return int((await self.connection.info("stats"))["total_commands_processed"])

    async def empty(self, _table: str) -> None:
        await self.connection.flushall()


Server = PostgresServer | RedisServer


@dataclass(frozen=True, slots=True)
class Servers:
    """What a run has; without Redis its backend is left out."""

    postgres: PostgresServer
    redis: RedisServer | None

    @property
    def contenders(self) -> list[Contender]:
        return [each for each in CONTENDERS if self.redis or not each.uses_redis]

    def of(self, contender: Contender) -> Server:
        if contender.uses_redis:
            assert self.redis is not None
            return self.redis
        return self.postgres


@asynccontextmanager
async def connected(dsn: str, redis_url: str | None = None) -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        postgres, redis = PostgresServer(dsn, connection), None
        if redis_url is not None:
            client = await stack.enter_async_context(Redis.from_url(redis_url))
            redis = RedisServer(redis_url, client)
        yield Servers(postgres, redis)


def _cpu_seconds_of_family(parent: int) -> float:
    """Of a process and its children; those that have ended are in the parent's own figures."""
    family = _Process.read(parent)
    pids = (int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal())
    children = [each for each in map(_Process.read, pids) if each.parent == parent]
    return family.seconds + family.seconds_of_ended + sum(each.seconds for each in children)


class _Process(NamedTuple):
    parent: int
    seconds: float
    seconds_of_ended: float  # children

    @classmethod
    def read(cls, pid: int) -> "_Process":
        """See proc_pid_stat(5); nobody's, where there is no such process."""
        directory = Path(f"/proc/{pid}")
        try:
            # After the name, which may hold anything.
            fields = (directory / "stat").read_text("utf-8").rpartition(")")[2].split()
            # In nanoseconds; the other file has hundredths of a second.
            nanoseconds = int((directory / "schedstat").read_text("utf-8").split()[0])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return cls(0, 0, 0)
        ended = int(fields[13]) + int(fields[14])
        return cls(int(fields[1]), nanoseconds / 1e9, ended / os.sysconf("SC_CLK_TCK"))


@contextmanager
def redis_server() -> Iterator[str | None]:
    """The URL of a Redis for the time of the `with` block; None where none is installed.

    It saves no snapshots: they would take time from whoever is measured meanwhile.
    """
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="taskiq-redis-") as directory:
        socket = Path(directory) / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", directory]
        process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        try:
            while not socket.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"redis-server ended with status {process.returncode}")
                time.sleep(0.01)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait()
