"""PgBouncers that have few servers for their clients, or are in session mode."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.conftest import Database
from tests.pooler import Pooler, pgbouncer


@pytest.fixture(scope="module")
def old_pooler(server_dsn: str) -> Iterator[Pooler]:
    """A PgBouncer with two servers for each user, which carries no prepared statements."""
    with pgbouncer(server_dsn, pool_size=2, carries=False) as pooler:
        yield pooler


@pytest.fixture
def old(database: Database, old_pooler: Pooler) -> Database:
    return replace(database, pooler=old_pooler)


@pytest.fixture(scope="module")
def new_pooler(server_dsn: str) -> Iterator[Pooler]:
    """A PgBouncer with two servers for each user, as it comes: it carries what it can."""
    with pgbouncer(server_dsn, pool_size=2) as pooler:
        yield pooler


@pytest.fixture(scope="module")
def session_pooler(server_dsn: str) -> Iterator[Pooler]:
    """A PgBouncer in session mode, with a server for each connection of a test."""
    with pgbouncer(server_dsn, mode="session") as pooler:
        yield pooler
