"""Where the figures come from: versions and settings, without names of hosts, users or paths."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final

from benchmarks.servers import DURABLE, Servers

_SETTINGS: Final = (*DURABLE, "shared_buffers", "max_wal_size")
_PACKAGES: Final = (
    "taskiq-sa-pg",
    "taskiq-postgres",
    "taskiq-redis",
    "taskiq",
    "sqlalchemy",
    "asyncpg",
    "psycopg",
    "redis",
)


async def read_environment(servers: Servers) -> list[list[str]]:
    """Rows of a table."""
    show = servers.postgres.connection.fetchval
    settings = [f"{name}={await show(f'SHOW {name}')}" for name in _SETTINGS]
    rows = [
        ["date", datetime.now(UTC).date().isoformat()],
        ["system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"],
        ["load average before the run", f"{os.getloadavg()[0]:.2f}"],
        ["PostgreSQL", ", ".join([await show("SHOW server_version"), *settings])],
        ["Python", platform.python_version()],
        ["packages", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)],
    ]
    if servers.redis:
        rows.append(["Redis", (await servers.redis.connection.info("server"))["redis_version"]])
    return rows
