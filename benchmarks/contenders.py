"""The result backends that are compared, each with its default arguments."""

import random
import string
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from taskiq import AsyncResultBackend, TaskiqResult
from taskiq_pg.asyncpg import AsyncpgResultBackend
from taskiq_pg.psycopg import PsycopgResultBackend

from taskiq_sa_pg import SQLAlchemyResultBackend

Backend = AsyncResultBackend[Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """One result backend with a table of its own; `make` takes a DSN and the table's name."""

    name: str
    table: str
    make: Callable[[str, str], Backend]


OURS: Final = Contender(
    "taskiq_sa_pg",
    "sa_pg_results",
    lambda dsn, table: SQLAlchemyResultBackend(dsn, table_name=table, run_migrations=True),
)
ASYNCPG_PEER: Final = Contender(
    "taskiq-postgres asyncpg",
    "asyncpg_results",
    lambda dsn, table: AsyncpgResultBackend(dsn, table_name=table),
)
PSYCOPG_PEER: Final = Contender(
    "taskiq-postgres psycopg",
    "psycopg_results",
    lambda dsn, table: PsycopgResultBackend(dsn, table_name=table),
)
CONTENDERS: Final = (OURS, ASYNCPG_PEER, PSYCOPG_PEER)


@asynccontextmanager
async def started(contender: Contender, dsn: str, application_name: str) -> AsyncIterator[Backend]:
    """The contender's backend, between its startup() and shutdown()."""
    backend = contender.make(named(dsn, application_name), contender.table)
    await backend.startup()
    try:
        yield backend
    finally:
        await backend.shutdown()


def named(dsn: str, application_name: str) -> str:
    """The DSN, for connections that pg_stat_activity shows under this name."""
    return f"{dsn}&application_name={quote(application_name)}"


def make_result(return_value: str = "done") -> TaskiqResult[Any]:
    return TaskiqResult(is_err=False, return_value=return_value, execution_time=0.01)


def make_payload(size: int) -> str:
    """The same text in every run, which PostgreSQL cannot compress."""
    generator = random.Random(size)  # noqa: S311 - no secret
    return "".join(generator.choices(string.ascii_letters + string.digits, k=size))
