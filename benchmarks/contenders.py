"""The result backends that are compared, each with its default arguments."""

import itertools
import random
import string
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote

from taskiq import AsyncResultBackend, TaskiqResult
from taskiq_pg.asyncpg import AsyncpgResultBackend
from taskiq_pg.psycopg import PsycopgResultBackend
from taskiq_redis import RedisAsyncResultBackend

from taskiq_sa_pg import SQLAlchemyResultBackend

Backend = AsyncResultBackend[Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """A result backend; `make` takes the server's address and the name of a table."""

    name: str
    table: str
    make: Callable[[str, str], Backend] | None
    uses_redis: bool = False
    has_metadata: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it counts its statements."""
        return self.table.startswith("sa_pg")


OURS: Final = Contender(
    "taskiq_sa_pg",
    "sa_pg_results",
    lambda dsn, table: SQLAlchemyResultBackend(dsn, table_name=table, run_migrations=True),
)
PEER: Final = Contender(
    "taskiq-postgres asyncpg",
    "asyncpg_results",
    lambda dsn, table: AsyncpgResultBackend(dsn, table_name=table),
)
# Whatever sets these two apart is no difference between backends: it is the noise of the run.
PEER_AGAIN: Final = replace(PEER, name=f"{PEER.name}, again", table="asyncpg_results_again")
PSYCOPG_PEER: Final = Contender(
    "taskiq-postgres psycopg",
    "psycopg_results",
    lambda dsn, table: PsycopgResultBackend(dsn, table_name=table),
)
REDIS_PEER: Final = Contender(
    "taskiq-redis", "", lambda url, _: RedisAsyncResultBackend(url), uses_redis=True
)
CONTENDERS: Final = (OURS, PEER, PSYCOPG_PEER, REDIS_PEER)

# Inside a worker only.
NO_BACKEND: Final = Contender("no result backend", "", None)
OURS_TRACKED: Final = Contender(
    "taskiq_sa_pg, metadata and track",
    "sa_pg_tracked",
    lambda dsn, table: SQLAlchemyResultBackend(
        dsn, table_name=table, run_migrations=True, track="started"
    ),
    has_metadata=True,
)
IN_THE_WORKER: Final = (NO_BACKEND, OURS, OURS_TRACKED, PEER, REDIS_PEER)


@asynccontextmanager
async def started(contender: Contender, address: str, client: str) -> AsyncIterator[Backend]:
    """The backend between startup() and shutdown(); pg_stat_activity shows it as `client`."""
    if not contender.uses_redis:
        address = f"{address}&application_name={quote(client)}"
    assert contender.make is not None
    backend = contender.make(address, contender.table)
    await backend.startup()
    try:
        yield backend
    finally:
        await backend.shutdown()


def make_result(return_value: str = "done") -> TaskiqResult[Any]:
    return TaskiqResult(is_err=False, return_value=return_value, execution_time=0.01)


def make_payload(size: int) -> str:
    """The same text in every run, which PostgreSQL cannot compress."""
    generator = random.Random(size)  # noqa: S311 - no secret
    return "".join(generator.choices(string.ascii_letters + string.digits, k=size))


def new_ids() -> Iterator[str]:
    """Like taskiq's ids, but made in a fraction of the time, which counts as the backend's."""
    return (f"{random.getrandbits(128):032x}" for _ in itertools.count())
