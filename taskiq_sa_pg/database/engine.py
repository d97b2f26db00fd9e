"""Creates the engine for a DSN, and checks engines that are passed in."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from taskiq_sa_pg.database.dsn import (
    TCP_OPTIONS,
    Address,
    Dsn,
    DsnSource,
    parse_dsn,
    plain_address,
)
from taskiq_sa_pg.database.errors import NoAddressError
from taskiq_sa_pg.exceptions import ConfigurationError, check_whole

# In pg_stat_activity.
_APPLICATION_NAME: Final = "taskiq_sa_pg"

# The connection arguments that SQLAlchemy's dialects derive from a URL.
_FROM_URL: Final = ("host", "port", "user", "password", "database", "dbname")

# The smallest valid values: SQLAlchemy's 0 and -1 mean no limit.
_LEAST: Final = {"pool_size": 0, "max_overflow": -1}

# The setting that turns a driver's prepared statements off. Behind a pooler that does not support
# them, their names collide with those of other clients: one's SELECT runs as another's DELETE.
_UNPREPARED: Final[dict[str, tuple[str, Any]]] = {
    "asyncpg": ("statement_cache_size", 0),
    "psycopg": ("prepare_threshold", None),
}


def make_engine(source: DsnSource, name: str = "dsn", /, **engine_kwargs: Any) -> AsyncEngine:
    """Creates an engine for a DSN; it does not connect.

    Args:
        source: The DSN, or a callable without arguments that returns it. A callable is called
            for every new connection, so credentials may rotate; the driver is chosen from the
            first DSN that it returns.
        name: The name of the argument, for errors.
        **engine_kwargs: As for `create_async_engine`; `connect_args` override the DSN.

    Each new connection checks whether it goes through a pooler, until one does. From then on
    statements are not prepared there, unless the DSN or `connect_args` configure it.

    Raises:
        ConfigurationError: As parse_dsn(), or arguments that create_async_engine refuses.
    """
    address = _address_of(source, name)
    # Rows hold users' data, which should not be in the texts of errors.
    engine_kwargs.setdefault("hide_parameters", True)
    if "poolclass" not in engine_kwargs and "pool" not in engine_kwargs:
        # Overflow connections are closed when they are returned, and opening one costs more than
        # the statements that it runs.
        engine_kwargs.setdefault("pool_size", 5)
        engine_kwargs.setdefault("max_overflow", 0)
    for argument in _LEAST.keys() & engine_kwargs.keys():
        check_whole(argument, engine_kwargs[argument], _LEAST[argument])
    try:
        connect_args = dict(engine_kwargs.pop("connect_args", {}))
        engine = create_async_engine(address.url, **engine_kwargs)
    except ImportError as exc:
        driver = address.drivername.partition("+")[2]
        raise ConfigurationError(
            f"{name} needs the driver {driver}, which is not installed: {exc}. "
            f"`pip install 'taskiq-sa-pg{'[psycopg]' if driver == 'psycopg' else ''}'` installs it"
        ) from exc
    except (TypeError, ValueError, LookupError, ArgumentError) as exc:
        raise ConfigurationError(f"cannot create an engine: {exc}") from exc

    @event.listens_for(engine.sync_engine, "do_connect")
    def use_current_address(
        dialect: Any, connection_record: Any, cargs: Any, cparams: dict[str, Any]
    ) -> None:
        current = _address_of(source, name) if callable(source) else address
        if current.drivername != address.drivername:
            raise ConfigurationError(
                f"the {name} callable changed the driver from {address.drivername} to "
                f"{current.drivername}: return DSNs of one driver"
            )
        for part in _FROM_URL:
            cparams.pop(part, None)
        cparams.update(_named(current).connect_arguments(), **connect_args)

    event.listen(engine.sync_engine, "do_connect", partial(_connect_as_pooled, set()))
    is_asyncpg = address.drivername == "postgresql+asyncpg"
    event.listen(engine.sync_engine, "connect", _set_keepalive if is_asyncpg else _drop_all)
    return engine


def check_engine(engine: object, engine_kwargs: Mapping[str, Any] | None) -> None:
    """Checks the user's engine.

    Raises:
        ConfigurationError: It is not an AsyncEngine on PostgreSQL, or there are engine arguments,
            which are for dsn= only.
    """
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(
            f"engine must be an AsyncEngine, from create_async_engine(), not "
            f"{type(engine).__qualname__}"
        )
    if engine.dialect.name != "postgresql":
        raise ConfigurationError(f"engine must be for PostgreSQL, not for {engine.dialect.name}")
    if engine_kwargs:
        raise ConfigurationError(
            f"{', '.join(sorted(engine_kwargs))}: engine arguments need dsn=; set them on your "
            "own engine instead"
        )


def may_be_of(own: Dsn | AsyncEngine | None, engine: Engine) -> bool:
    """Whether an engine has the same database as a DSN or another engine, judged by their URLs."""
    if isinstance(own, AsyncEngine):
        if own.sync_engine is engine:
            return True
        own = own.url
    try:
        return own is None or plain_address(parse_dsn(own).url).may_be(plain_address(engine.url))
    except ConfigurationError:  # an unknown form
        return True


def _named(address: Address) -> Address:
    # PGAPPNAME overrides it: libpq reads that, and asyncpg does not.
    name = os.environ.get("PGAPPNAME") or _APPLICATION_NAME
    return replace(address, options={"fallback_application_name": name, **address.options})


async def refuse_pooler(driver: Any) -> None:
    """Checks that the user's engine does not prepare statements behind a pooler.

    Raises:
        ConfigurationError: It does; names the setting that turns them off.
    """
    if hasattr(driver, "get_server_pid"):
        # asyncpg has no public name for it.
        name, is_prepared = "asyncpg", getattr(driver, "_stmt_cache_enabled", False)
    else:
        name, is_prepared = "psycopg", driver.prepare_threshold is not None
    if is_prepared and await _is_pooled(driver):
        setting, off = _UNPREPARED[name]
        raise ConfigurationError(
            "the engine connects through a pooler, such as PgBouncer, and prepares statements. "
            "Their names collide there with those of other clients, so that wrong statements run. "
            "Turn them off with "
            f'create_async_engine(..., connect_args={{"{setting}": {off}}})'
        )


def _connect_as_pooled(
    pooled: set[str], dialect: Any, _record: Any, cargs: Any, cparams: dict[str, Any]
) -> Any:
    setting, off = _UNPREPARED[dialect.driver]
    if setting in cparams:
        return None
    place = str((cparams.get("host"), cparams.get("port")))
    if place not in pooled:
        # For each connection: there may be several hosts, or a new pooler.
        connection = dialect.connect(*cargs, **cparams)
        is_usable = False
        try:
            is_usable = not connection.run_async(_is_pooled)
        finally:
            if not is_usable:
                dialect.do_terminate(connection)
        if is_usable:
            return connection
        pooled.add(place)
    cparams[setting] = off
    return None


async def _is_pooled(driver: Any) -> bool:
    # A pooler invents the process id that it reports to clients. The simple protocol prepares
    # nothing.
    query = "SELECT WHERE pg_backend_pid() = {}".format
    if hasattr(driver, "get_server_pid"):
        status = await driver.execute(query(driver.get_server_pid()))
    else:
        is_idle = driver.info.transaction_status.name == "IDLE"
        cursor = await driver.execute(query(driver.info.backend_pid), prepare=False)
        status = cursor.statusmessage
        if is_idle:
            await driver.rollback()
    return bool(status == "SELECT 0")


def keep_notifications(driver: Any) -> None:
    """Removes the handler that drops notifications, from a psycopg connection that listens."""
    if hasattr(driver, "remove_notify_handler"):
        with suppress(ValueError):  # a borrowed engine's connection has no such handler
            driver.remove_notify_handler(_drop)


def _drop_all(dbapi_connection: Any, _connection_record: Any) -> None:
    # Behind a pooler, a server may still listen for a client that has gone. psycopg would keep all
    # its notifications for ever.
    dbapi_connection.driver_connection.add_notify_handler(_drop)


def _drop(_notification: Any) -> None: ...


def _address_of(source: DsnSource, name: str) -> Address:
    if not callable(source):
        return parse_dsn(source, name)
    try:
        dsn = source()
    except Exception as exc:
        # It may use a service that is briefly unavailable.
        raise NoAddressError(f"the {name} callable failed: {type(exc).__name__}: {exc}") from exc
    return parse_dsn(dsn, name)


def _set_keepalive(dbapi_connection: Any, _connection_record: Any) -> None:
    # asyncpg has no parameters for keepalives.
    transport = getattr(dbapi_connection.driver_connection, "_transport", None)
    peer = None if transport is None else transport.get_extra_info("socket")
    if peer is None or peer.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_OPTIONS.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
