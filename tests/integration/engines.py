"""Engines as applications make them, on which a backend has to be at home."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from taskiq_sa_pg.database import parse_dsn
from tests.pooler import UNPREPARED, is_pooled

Shape = Callable[[str], AsyncEngine]


def make(dsn: str, **kwargs: Any) -> AsyncEngine:
    """What create_async_engine() makes of the address, without the library's help."""
    address = parse_dsn(dsn)
    # What the guide has people set behind a pooler.
    off = dict([UNPREPARED[address.drivername.partition("+")[2]]]) if is_pooled(dsn) else {}
    connect_args = {**address.connect_arguments(), **off, **kwargs.pop("connect_args", {})}
    return create_async_engine(f"{address.drivername}://", connect_args=connect_args, **kwargs)


def made_with(**kwargs: Any) -> Shape:
    return lambda dsn: make(dsn, **kwargs)


def dumps(value: Any) -> str:
    """Another text than the standard library's: without spaces, and with sorted keys."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NAIVE_UTC).decode()


def loads(text: str | bytes) -> Any:
    """Not what was stored: whoever decodes with it, notices."""
    return {"decoded by": "the application", "value": orjson.loads(text)}


def with_settings(dsn: str) -> AsyncEngine:
    address = parse_dsn(dsn)
    if address.drivername.endswith("asyncpg"):
        settings: dict[str, Any] = {"server_settings": {"statement_timeout": "20s", "jit": "off"}}
    else:
        others = address.options.get("options", "")
        settings = {"options": f"{others} -c statement_timeout=20s -c jit=off"}
    return make(dsn, connect_args=settings)


def without_prepared_statements(dsn: str) -> AsyncEngine:
    return make(dsn, connect_args=dict([UNPREPARED[parse_dsn(dsn).drivername.partition("+")[2]]]))


def sharing_a_pool(dsn: str) -> AsyncEngine:
    return make(dsn, pool_size=2).execution_options(isolation_level="SERIALIZABLE")


def watched(dsn: str) -> AsyncEngine:
    """An application's listener that runs a statement on every connection that is taken."""
    engine = make(dsn)

    @event.listens_for(engine.sync_engine, "engine_connect")
    def ask(connection: Connection) -> None:
        connection.execute(text("SET application_name = 'watched'"))

    return engine


SHAPES: Final[Mapping[str, Shape]] = {
    "plain": made_with(),
    "one connection": made_with(pool_size=1, max_overflow=0, pool_timeout=2),
    "overflow": made_with(pool_size=1, max_overflow=10),
    "no bound": made_with(pool_size=0),
    "cared for": made_with(pool_size=3, pool_pre_ping=True, pool_recycle=3600, pool_use_lifo=True),
    "NullPool": made_with(poolclass=NullPool),
    "no reset": made_with(pool_reset_on_return=None),
    "echo": made_with(echo=True, echo_pool="debug"),
    "parameters hidden": made_with(hide_parameters=True),
    "JSON of its own": made_with(json_serializer=dumps, json_deserializer=loads),
    "AUTOCOMMIT": made_with(isolation_level="AUTOCOMMIT"),
    "REPEATABLE READ": made_with(isolation_level="REPEATABLE READ"),
    "SERIALIZABLE": made_with(isolation_level="SERIALIZABLE"),
    "AUTOCOMMIT as an option": made_with(execution_options={"isolation_level": "AUTOCOMMIT"}),
    "another engine's pool": sharing_a_pool,
    "no prepared statements": without_prepared_statements,
    "settings of the server's": with_settings,
    "a listener that asks": watched,
}
