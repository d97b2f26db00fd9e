"""How a database's place reads in messages and repr()."""

from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyScheduleSource
from taskiq_sa_pg.database import Database

DRIVERS = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT"):
        monkeypatch.delenv(name, raising=False)


@DRIVERS
@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("user:secret@db1/tasks", "db1:5432/tasks"),
        ("user:secret@db1:6432/tasks?application_name=x", "db1:6432/tasks"),
        ("user:secret@a:1,b/tasks", "a:1,b:5432/tasks"),
        ("user:secret@[::1]:7/tasks", "[::1]:7/tasks"),
        ("user:secret@/tasks?host=/run/postgresql", "/run/postgresql:5432/tasks"),
        ("user:secret@/tasks", "default host:5432/tasks"),
        ("db1", "db1:5432"),
    ],
)
def test_a_dsn(address: str, place: str, driver: str) -> None:
    assert Database(f"postgresql+{driver}://{address}").place == place


@DRIVERS
@pytest.mark.parametrize(
    ("connect_args", "place"),
    [
        ({"host": "db2"}, "db2:5/d"),
        ({"host": ["a", "b"], "port": [1, 2]}, "a:1,b:2/d"),
        ({"port": 9}, "h:9/d"),
        ({"database": "e", "timeout": 3}, "h:5/e"),
        ({"dbname": "e", "host": None}, "h:5/e"),
    ],
)
def test_connect_args_override_the_dsn(
    connect_args: dict[str, Any], place: str, driver: str
) -> None:
    dsn = f"postgresql+{driver}://user:secret@h:5/d"
    assert Database(dsn, engine_kwargs={"connect_args": connect_args}).place == place


@DRIVERS
@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("user:secret@db1:6432/tasks", "db1:6432/tasks"),
        ("user:secret@/tasks?host=a:1&host=b:2", "a:1,b:2/tasks"),
        ("/tasks", "tasks"),  # the host may be in connect_args
        ("", ""),
    ],
)
def test_an_engine(address: str, place: str, driver: str) -> None:
    engine = create_async_engine(f"postgresql+{driver}://{address}")
    assert Database(engine=engine).place == place


def test_the_environment_of_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db3")
    monkeypatch.setenv("PGPORT", "5439")
    assert Database("postgresql:///d").place == "db3:5439/d"
    assert Database("postgresql://h/d").place == "h:5439/d"
    assert Database("postgresql://a:1,b/d").place == "a:1,b:5432/d"


def test_a_callable_is_not_asked_before_it_is_needed() -> None:
    def source() -> str:
        raise AssertionError

    assert Database(source).place == ""


def test_brokers_and_sources_name_table_and_place() -> None:
    broker = SQLAlchemyBroker("postgresql://user:secret@localhost/d", table_name="t", schema="s")
    assert repr(broker) == "<SQLAlchemyBroker s.t_queue on localhost:5432/d>"
    assert repr(broker.listening_to("mail")) == repr(broker)
    source = SQLAlchemyScheduleSource(broker)
    assert repr(source) == "<SQLAlchemyScheduleSource s.t_schedules on localhost:5432/d>"
    assert repr(SQLAlchemyBroker(lambda: "")) == "<SQLAlchemyBroker taskiq_results_queue>"
