"""Where the figures come from: versions and settings, without names of hosts, users or paths."""

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final

import asyncpg

# The server is as durable as one in production.
SETTINGS: Final = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}

_SHOWN: Final = (*SETTINGS, "shared_buffers", "max_wal_size")
_PACKAGES: Final = (
    "taskiq-sa-pg",
    "taskiq-postgres",
    "taskiq",
    "sqlalchemy",
    "asyncpg",
    "psycopg",
    "psycopg-pool",
)


@dataclass(frozen=True, slots=True)
class Environment:
    measured_on: str
    system: str
    cpus: int
    python: str
    postgresql: str
    settings: dict[str, str]
    packages: dict[str, str]


async def read_environment(dsn: str) -> Environment:
    connection = await asyncpg.connect(dsn)
    try:
        return Environment(
            measured_on=datetime.now(UTC).date().isoformat(),
            system=f"{platform.system()} {platform.machine()}",
            cpus=os.cpu_count() or 0,
            python=platform.python_version(),
            postgresql=await connection.fetchval("SHOW server_version"),
            settings={name: await connection.fetchval(f"SHOW {name}") for name in _SHOWN},
            packages={name: version(name) for name in _PACKAGES},
        )
    finally:
        await connection.close()
