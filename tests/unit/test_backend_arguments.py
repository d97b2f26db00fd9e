"""The constructor: what it refuses, the order of its arguments, and that it connects to nothing."""

import inspect
import math
import re
import socket
import sys
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
        (
            {"dsn": DSN, "max_connections": 0},
            "max_connections must be a whole number of 1 or more, not 0",
        ),
        ({"engine": borrowed_engine(), "max_connections": -1}, "max_connections .* not -1"),
        ({"dsn": DSN, "listen_dsn": 7}, "^listen_dsn must be a str"),
        ({"dsn": DSN, "listen_dsn": "postgresql+psycopg2://h"}, "^listen_dsn names the driver"),
        ({"dsn": DSN, "listen_dsn": "postgresql://h?connect_timeout=x"}, "^the listen_dsn's param"),
        ({"dsn": DSN, "listen_dsn": "postgresql://user:hunter2/d"}, "cannot|percent-encoded"),
        ({"dsn": DSN, "listen_dsn": DSN, "notify": False}, "listen_dsn needs notify=True"),
        ({"dsn": DSN, "table_name": ""}, "table_name must not be empty"),
        ({"dsn": DSN, "table_name": "t" * 64}, "table_name is 64 bytes"),
        (
            {"dsn": DSN, "table_name": "app.results"},
            "not have a dot: .* schema='app', table_name='results'",
        ),
        ({"dsn": DSN, "schema": "s\x00"}, "schema"),
        ({"dsn": DSN, "field_for_task_id": "Integer"}, "field_for_task_id"),
        ({"dsn": DSN, "field_for_payload": "Json"}, "field_for_payload"),
        (
            {"dsn": DSN, "field_for_payload": "Jsonb", "serializer": PickleSerializer()},
            "PickleSerializer",
        ),
        ({"dsn": DSN, "serializer": "json"}, "serializer must be an object with .* not 'json'"),
        ({"dsn": DSN, "serializer": JSONSerializer}, "serializer must be an object .* not <class"),
        ({"dsn": DSN, "serializer": object()}, "serializer must be an object with dumpb()"),
        ({"dsn": DSN, "pool_size": -1}, "pool_size must be a whole number of 0 or more, not -1"),
        ({"dsn": DSN, "pool_size": "5"}, "pool_size must be a whole number of 0 or more, not '5'"),
        ({"dsn": DSN, "max_overflow": -2}, "max_overflow must be a whole number of -1 or more"),
        ({"dsn": DSN, "connect_args": "x"}, "cannot create an engine"),
        ({"dsn": DSN, "echo": "false"}, "cannot create an engine"),
        ({"dsn": DSN, "tabel_name": "jobs"}, "no argument tabel_name: did you mean table_name?"),
        ({"dsn": lambda: DSN, "serialiser": 1}, "argument serialiser: did you mean serializer?"),
        ({"engine": borrowed_engine(), "keep_result": 1}, "did you mean keep_results?"),
        ({"dsn": DSN, "nonsense": 1}, "cannot create an engine: .*nonsense"),
        ({"dsn": DSN, "track": ["started"]}, "track must be"),
        ({"dsn": DSN, "extra_values": {}}, "extra_values must be a callable, not {}"),
        ({"dsn": DSN, "extra_values": lambda *_: {}}, "the model has none: subclass ResultMixin"),
        ({"dsn": DSN, "extra_values": no_values}, "ordinary function, not an async one"),
        ({"dsn": DSN, "extra_values": partial(no_values)}, "ordinary function, not an async one"),
        ({"dsn": DSN, "extra_values": NoValues()}, "ordinary function, not an async one"),
        ({"dsn": DSN, "models": TableConfig()}, "models must be a Models, not TableConfig"),
        ({"dsn": DSN, "models": build_models("a"), "table_name": "b"}, "to the models only"),
        ({"dsn": DSN, "models": build_models("a"), "schema": "s"}, "to the models only"),
        (
            {"dsn": DSN, "models": build_models(), "field_for_payload": "Jsonb"},
            "to the models only",
        ),
        (
            {"dsn": DSN, "models": build_models(field_for_task_id="Uuid"), "table_name": "b"},
            "to the models only",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        Backend(**arguments)
    assert "hunter2" not in str(caught.value)


FLAGS = "keep_results", "notify", "run_migrations"
NUMBERS = {
    "max_connections": "a whole number of 1 or more",
    "max_payload_bytes": "a whole number of 1 or more, or None",
    "retry_timeout": "a number of 0 or more",
    "startup_timeout": "a number of 0 or more",
    "gather_window": "a number of 0 or more",
    "command_timeout": "a number above 0",
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["no", "false", "", 1, None])
def test_what_is_no_flag_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} must be True or False, not {value!r}$"):
        Backend(DSN, **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["4", True, math.nan, -1, [], None, 1.5])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    if (value is None and "None" in NUMBERS[name]) or (
        value == 1.5 and "whole" not in NUMBERS[name]
    ):
        Backend(DSN, **{name: value})
        return
    said = f"{name} must be {NUMBERS[name]}, not {value!r}"
    with pytest.raises(ConfigurationError, match=f"^{re.escape(said)}$"):
        Backend(DSN, **{name: value})


def test_an_int_will_do_for_a_number_of_seconds() -> None:
    Backend(DSN, retry_timeout=0, command_timeout=1, startup_timeout=math.inf)


@pytest.mark.parametrize("name", ["dsn", "listen_dsn"])
def test_a_driver_that_is_not_installed_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    arguments = {"dsn": DSN, name: "postgresql+psycopg://user:hunter2@h/d"}
    said = rf"{name} needs the driver psycopg.*`pip install 'taskiq-sa-pg\[psycopg\]'`"
    with pytest.raises(ConfigurationError, match=f"^{said}"):
        Backend(**arguments)


@pytest.mark.parametrize("timeout", ["5", math.nan, True, []])
async def test_a_timeout_that_is_no_number_is_refused(timeout: Any) -> None:
    backend = Backend(DSN)
    said = re.escape(f"timeout must be a number, or None, not {timeout!r}")
    for wait in (backend.wait_result, backend.wait_results):
        with pytest.raises(ConfigurationError, match=said):
            await wait(["t"], timeout=timeout)
    for watch in (backend.as_completed, backend.watch_progress):
        with pytest.raises(ConfigurationError, match=said):
            watch(["t"], timeout=timeout)


@pytest.mark.parametrize("number", ["5", 1.5, True, 0])
async def test_a_number_of_rows_that_is_none_is_refused(number: Any) -> None:
    backend = Backend(DSN)
    said = f"must be a whole number of 1 or more.*, not {number!r}$"
    with pytest.raises(ConfigurationError, match=f"^limit {said}"):
        await backend.get_running(number)
    with pytest.raises(ConfigurationError, match=f"^batch_size {said}"):
        backend.iter_results(batch_size=number)
    with pytest.raises(ConfigurationError, match=f"^limit {said}"):
        await backend.prune(limit=number)


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


def test_backends_of_the_same_tables_share_their_models() -> None:
    one, other = Backend(DSN, table_name="t"), Backend("postgresql://other/d", table_name="t")
    assert one.models is other.models
    assert one.models.Queue is None
    assert Backend(DSN).models is not one.models
    assert Backend(DSN, table_name="t", field_for_task_id="Uuid").models is not one.models


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
