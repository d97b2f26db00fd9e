"""An engine for a DSN."""

import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from sqlalchemy import URL, Engine, event
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from taskiq_sa_pg.database.dsn import TCP_OPTIONS, Address, Dsn, DsnSource, parse_dsn
from taskiq_sa_pg.database.errors import NoAddressError
from taskiq_sa_pg.exceptions import ConfigurationError, check_whole

# What SQLAlchemy's dialects make of a URL; the rest of a connection's arguments is the engine's.
_FROM_URL: Final = ("host", "port", "user", "password", "database", "dbname")

# The least that a pool can do with: SQLAlchemy's 0 and -1 set no limit.
_LEAST: Final = {"pool_size": 0, "max_overflow": -1}
# What turns a driver's prepared statements off. Behind a pooler that does not carry them along,
# their names meet those of other clients: what is a SELECT to one runs as the DELETE of another.
_UNPREPARED: Final[dict[str, tuple[str, Any]]] = {
    "asyncpg": ("statement_cache_size", 0),
    "psycopg": ("prepare_threshold", None),
}


def make_engine(source: DsnSource, name: str = "dsn", /, **engine_kwargs: Any) -> AsyncEngine:
    """An engine for a DSN; nothing connects yet.

    Args:
        source: The DSN, or a callable without arguments that returns it. A callable is asked
            again for every new connection, so credentials may rotate; which driver serves it
            is settled by the first answer.
        name: What errors call it.
        **engine_kwargs: As for `create_async_engine`; `connect_args` win over the DSN.

    Each new connection finds out whether a pooler stands between, until one does; from then on
    statements are not prepared there, unless the DSN or `connect_args` say how they are.

    Raises:
        ConfigurationError: As parse_dsn(), or arguments that create_async_engine refuses.
    """
    address = _address_of(source, name)
    # Rows hold the users' data; an error's text need not.
    engine_kwargs.setdefault("hide_parameters", True)
    if "poolclass" not in engine_kwargs and "pool" not in engine_kwargs:
        # Overflow connections are closed when they come back, and to open one costs more than
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
        raise ConfigurationError(f"cannot make an engine: {exc}") from exc

    @event.listens_for(engine.sync_engine, "do_connect")
    def use_current_address(
        dialect: Any, connection_record: Any, cargs: Any, cparams: dict[str, Any]
    ) -> None:
        current = _address_of(source, name) if callable(source) else address
        if current.drivername != address.drivername:
            raise ConfigurationError(
                f"the {name} callable changed the driver from {address.drivername} to "
                f"{current.drivername}; an engine has one"
            )
        for part in _FROM_URL:
            cparams.pop(part, None)
        cparams.update(current.connect_arguments(), **connect_args)

    event.listen(engine.sync_engine, "do_connect", partial(_connect_as_pooled, set()))
    is_asyncpg = address.drivername == "postgresql+asyncpg"
    event.listen(engine.sync_engine, "connect", _notice_silence if is_asyncpg else _drop_all)
    return engine


def check_engine(engine: object, engine_kwargs: Mapping[str, Any] | None) -> None:
    """Refuses an engine that is none of ours to use, and arguments for one that is made.

    Raises:
        ConfigurationError: It is no AsyncEngine on PostgreSQL, or there are such arguments.
    """
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(
            f"engine must be an AsyncEngine, as create_async_engine() makes it, not "
            f"{type(engine).__qualname__}"
        )
    if engine.dialect.name != "postgresql":
        raise ConfigurationError(
            f"engine must be one for PostgreSQL, not for {engine.dialect.name}"
        )
    if engine_kwargs:
        raise ConfigurationError(
            f"{', '.join(sorted(engine_kwargs))}: arguments for an engine go with dsn=; the "
            "engine that was given is used as it is"
        )


def may_be_of(own: Dsn | AsyncEngine | None, engine: Engine) -> bool:
    """Whether an engine leads where a DSN or another engine does, as far as their names tell."""
    if isinstance(own, AsyncEngine):
        if own.sync_engine is engine:
            return True
        own = own.url
    try:
        return own is None or _plain(parse_dsn(own).url).may_be(_plain(engine.url))
    except ConfigurationError:  # one of a kind that we do not know
        return True


def _plain(url: URL) -> Address:
    """An address without what only the driver of its URL knows."""
    places = {name: value for name, value in url.query.items() if name in {"host", "port"}}
    return parse_dsn(url.set(drivername="postgresql+psycopg", query=places))


async def refuse_pooler(driver: Any) -> None:
    """Refuses a connection of an engine that prepares statements behind a pooler.

    Raises:
        ConfigurationError: It does; names the setting that turns them off.
    """
    if hasattr(driver, "get_server_pid"):
        # asyncpg has nothing public that tells it.
        name, is_prepared = "asyncpg", getattr(driver, "_stmt_cache_enabled", False)
    else:
        name, is_prepared = "psycopg", driver.prepare_threshold is not None
    if is_prepared and await _is_pooled(driver):
        setting, off = _UNPREPARED[name]
        raise ConfigurationError(
            "the engine leads through a pooler, such as PgBouncer, and prepares its statements, "
            "whose names meet those of other clients there, so that one runs another's: turn that "
            f'off with create_async_engine(..., connect_args={{"{setting}": {off}}})'
        )


def _connect_as_pooled(
    pooled: set[str], dialect: Any, _record: Any, cargs: Any, cparams: dict[str, Any]
) -> Any:
    setting, off = _UNPREPARED[dialect.driver]
    if setting in cparams:
        return None
    place = str((cparams.get("host"), cparams.get("port")))
    if place not in pooled:
        # Each time: it may be several hosts, or a pooler that has come there since.
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
    # A pooler makes up the process id that it tells its clients. Asked by the simple protocol,
    # which prepares nothing.
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
    """Has psycopg's connection give its notifications to who asks for them."""
    if hasattr(driver, "remove_notify_handler"):
        with suppress(ValueError):  # of an engine that was given
            driver.remove_notify_handler(_drop)


def _drop_all(dbapi_connection: Any, _connection_record: Any) -> None:
    # Behind a pooler a server may still listen for a client that has gone. psycopg would keep all
    # that it sends, for ever.
    dbapi_connection.driver_connection.add_notify_handler(_drop)


def _drop(_notification: Any) -> None: ...
def _address_of(source: DsnSource, name: str) -> Address:
    if not callable(source):
        return parse_dsn(source, name)
    try:
        dsn = source()
    except Exception as exc:
        # It may ask somebody who does not answer for a moment.
        raise NoAddressError(f"the {name} callable failed: {type(exc).__name__}: {exc}") from exc
    return parse_dsn(dsn, name)


def _notice_silence(dbapi_connection: Any, _connection_record: Any) -> None:
    # asyncpg has no parameter for it.
    transport = getattr(dbapi_connection.driver_connection, "_transport", None)
    peer = None if transport is None else transport.get_extra_info("socket")
    if peer is None or peer.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_OPTIONS.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
