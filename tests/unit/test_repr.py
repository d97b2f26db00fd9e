"""repr() of a result backend: its table and its database, without credentials or a connection."""

from typing import Any

import pytest
from sqlalchemy import NullPool, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from taskiq_sa_pg import SQLAlchemyResultBackend

DSN = "postgresql://user:hunter2@localhost:5433/database"


def dsn() -> str:
    raise AssertionError("it is not called")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"dsn": DSN}, "localhost:5433/database"),
        ({"dsn": make_url(DSN)}, "localhost:5433/database"),
        ({"dsn": "postgresql+psycopg://user@localhost/database"}, "localhost:5432/database"),
        ({"dsn": "postgresql://user:hunter2@a,b:5433/database"}, "a:5432,b:5433/database"),
        ({"dsn": "postgresql:///database?host=/run/pg"}, "/run/pg:5432/database"),
        ({"dsn": "postgresql:///database?user=user"}, "default host:5432/database"),
        ({"dsn": "postgresql://user:hunter2@localhost"}, "localhost:5432"),
        (
            {"engine": create_async_engine(DSN.replace("sql:", "sql+asyncpg:"))},
            "localhost:5433/database",
        ),
        (
            {
                "engine": create_async_engine(
                    "postgresql+asyncpg://user:hunter2@localhost/database?sslcrldir=hunter2",
                    poolclass=NullPool,
                )
            },
            "localhost:5432/database",
        ),
    ],
)
def test_a_backend_names_its_table_and_its_database(
    arguments: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGHOST", "PGPORT"):
        monkeypatch.delenv(name, raising=False)
    backend: Any = SQLAlchemyResultBackend(**arguments, table_name="results", schema="tasks")
    assert repr(backend) == f"<SQLAlchemyResultBackend tasks.results on {place}>"


def test_a_callable_is_not_called() -> None:
    backend: Any = SQLAlchemyResultBackend(dsn)
    assert repr(backend) == "<SQLAlchemyResultBackend taskiq_results>"


class Backend(SQLAlchemyResultBackend[Any]): ...


def test_a_subclass_has_its_own_name() -> None:
    assert repr(Backend(DSN)) == "<Backend taskiq_results on localhost:5433/database>"
