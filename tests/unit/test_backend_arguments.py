"""The constructor: what it refuses, the order of its arguments, and that it connects to nothing."""

import inspect
import socket
from functools import partial
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress, TaskState
from taskiq.serializers import JSONSerializer, PickleSerializer

from taskiq_sa_pg import (
    ConfigurationError,
    NotStartedError,
    SQLAlchemyResultBackend,
    TableConfig,
    build_models,
)
from taskiq_sa_pg.database import Database

DSN = "postgresql://user:hunter2@localhost:1/database"

Backend = SQLAlchemyResultBackend[Any]


async def no_values(*_: Any) -> dict[str, Any]:
    return {}


class NoValues:
    """An async function of sorts."""

    async def __call__(self, *_: Any) -> dict[str, Any]:
        return {}


def borrowed_engine() -> Any:
    return create_async_engine("postgresql+asyncpg://user:hunter2@localhost:1/database")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either dsn= .* or engine="),
        ({"dsn": DSN, "engine": borrowed_engine()}, "either dsn= .* or engine="),
        ({"dsn": borrowed_engine()}, "not AsyncEngine"),
        ({"dsn": 7}, "dsn must be a str"),
        ({"dsn": "postgresql+psycopg2://user:hunter2@h/d"}, "psycopg2"),
        ({"dsn": "postgresql://user:hunter2/d"}, "cannot|percent-encoded"),
        ({"engine": DSN}, "must be an AsyncEngine.* not str"),
        ({"engine": create_engine("postgresql+psycopg://h/d")}, "AsyncEngine.* not Engine"),
        ({"engine": borrowed_engine(), "pool_size": 3, "echo": True}, "echo, pool_size: .*dsn="),
        ({"dsn": DSN, "check_schema": "maybe"}, '"error", "warn" or "off", not \'maybe\''),
        ({"dsn": DSN, "check_schema": True}, "check_schema"),
        ({"dsn": DSN, "max_connections": 0}, "max_connections must be 1 or more, not 0"),
        ({"engine": borrowed_engine(), "max_connections": -1}, "max_connections .* not -1"),
        ({"dsn": DSN, "listen_dsn": 7}, "dsn must be a str"),
        ({"dsn": DSN, "listen_dsn": "postgresql://user:hunter2/d"}, "cannot|percent-encoded"),
        ({"dsn": DSN, "listen_dsn": DSN, "notify": False}, "listen_dsn is for notify=True"),
        ({"dsn": DSN, "table_name": ""}, "table_name must not be empty"),
        ({"dsn": DSN, "table_name": "t" * 60}, "derived from table_name"),
        ({"dsn": DSN, "schema": "s\x00"}, "schema"),
        ({"dsn": DSN, "field_for_task_id": "Integer"}, "field_for_task_id"),
        ({"dsn": DSN, "field_for_payload": "Json"}, "field_for_payload"),
        (
            {"dsn": DSN, "field_for_payload": "Jsonb", "serializer": PickleSerializer()},
            "PickleSerializer",
        ),
        ({"dsn": DSN, "extra_values": {}}, "extra_values must be a callable, not {}"),
        ({"dsn": DSN, "extra_values": lambda *_: {}}, "the model has none: subclass ResultMixin"),
        ({"dsn": DSN, "extra_values": no_values}, "ordinary function, not an async one"),
        ({"dsn": DSN, "extra_values": partial(no_values)}, "ordinary function, not an async one"),
        ({"dsn": DSN, "extra_values": NoValues()}, "ordinary function, not an async one"),
        ({"dsn": DSN, "models": TableConfig()}, "models must be a Models, not TableConfig"),
        ({"dsn": DSN, "models": build_models("a"), "table_name": "b"}, "to the models alone"),
        ({"dsn": DSN, "models": build_models("a"), "schema": "s"}, "to the models alone"),
        (
            {"dsn": DSN, "models": build_models(), "field_for_payload": "Jsonb"},
            "to the models alone",
        ),
        (
            {"dsn": DSN, "models": build_models(field_for_task_id="Uuid"), "table_name": "b"},
            "to the models alone",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        Backend(**arguments)
    assert "hunter2" not in str(caught.value)


def test_another_databases_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = borrowed_engine()
    monkeypatch.setattr(engine.dialect, "name", "sqlite")
    with pytest.raises(ConfigurationError, match="for PostgreSQL, not for sqlite"):
        Backend(engine=engine)


def test_positional_arguments_are_those_of_other_backends() -> None:
    parameters = inspect.signature(SQLAlchemyResultBackend).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "dsn",
        "keep_results",
        "table_name",
        "field_for_task_id",
        "serializer",
    ]
    backend = Backend(DSN, False, "results", "Uuid", JSONSerializer())
    assert backend.keep_results is False
    assert backend.models.config == TableConfig("results", "Uuid")


def test_models_may_be_repeated_in_the_other_arguments() -> None:
    models = build_models("results", field_for_payload="Jsonb")
    backend = Backend(DSN, models=models, table_name="results", field_for_payload="Jsonb")
    assert backend.models is models
    assert Backend(DSN, models=models).models is models


@pytest.mark.parametrize("dsn", [DSN, make_url(DSN), "postgresql+psycopg://h/d", None])
def test_nothing_connects_at_construction(dsn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("connects")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    if dsn is None:
        Backend(engine=borrowed_engine())
    else:
        Backend(dsn)


def test_a_callable_dsn_is_not_asked_at_construction() -> None:
    def ask() -> str:
        raise AssertionError("asked")

    Backend(ask)


def test_no_repr_shows_the_password() -> None:
    backend = Backend(DSN)
    assert "hunter2" not in f"{backend!r} {backend.settings!r} {Database(DSN)!r}"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("set_result", ("t", TaskiqResult(is_err=False, return_value=1, execution_time=0.1))),
        ("is_result_ready", ("t",)),
        ("get_result", ("t",)),
        ("get_results", (["t", "u"],)),
        ("set_progress", ("t", TaskProgress(state=TaskState.STARTED, meta=None))),
        ("get_progress", ("t",)),
    ],
)
@pytest.mark.parametrize("keep_results", [True, False])
async def test_before_startup_every_method_says_so(
    method: str, arguments: tuple[Any, ...], keep_results: bool
) -> None:
    backend = Backend(DSN, keep_results)
    with pytest.raises(NotStartedError, match=r"not started.*startup\(\)"):
        await getattr(backend, method)(*arguments)


async def test_shutdown_without_startup_does_nothing() -> None:
    await Backend(DSN).shutdown()
