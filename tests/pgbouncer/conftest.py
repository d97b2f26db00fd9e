"""A PgBouncer that has few servers for its clients, and the drivers' defaults in front of it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.conftest import Database
from tests.pooler import Pooler, pgbouncer


@pytest.fixture(scope="module")
def old_pooler(server_dsn: str) -> Iterator[Pooler]:
    """A PgBouncer with two servers for each user, which carries no prepared statements."""
    with pgbouncer(server_dsn, pool_size=2, has_prepared_statements=False) as pooler:
        yield pooler


@pytest.fixture
def old(database: Database, old_pooler: Pooler) -> Database:
    return replace(database, pooler=old_pooler)


@pytest.fixture(scope="module")
def session_pooler(server_dsn: str) -> Iterator[Pooler]:
    """A PgBouncer in session mode, with a server for each connection of a test."""
    with pgbouncer(server_dsn, mode="session", pool_size=40) as pooler:
        yield pooler


def unfitting(database: Database, driver: str) -> str:
    """The address without the setting that the driver needs."""
    assert database.pooler is not None
    return database.pooler.dsn(database.schema, driver, is_fitting=False)
