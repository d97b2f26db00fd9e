"""An engine for a DSN."""

import socket
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from taskiq_sa_pg.database.dsn import TCP_OPTIONS, DsnSource, parse_dsn
from taskiq_sa_pg.exceptions import ConfigurationError

# What SQLAlchemy's dialects make of a URL; the rest of a connection's arguments is the engine's.
_FROM_URL: Final = ("host", "port", "user", "password", "database", "dbname")


def make_engine(source: DsnSource, **engine_kwargs: Any) -> AsyncEngine:
    """An engine for a DSN; nothing connects yet.

    Args:
        source: The DSN, or a callable without arguments that returns it. A callable is asked
            again for every new connection, so credentials may rotate; which driver serves it
            is settled by the first answer.
        **engine_kwargs: As for `create_async_engine`; `connect_args` win over the DSN.

    Raises:
        ConfigurationError: As parse_dsn(), or arguments that create_async_engine refuses.
    """
    connect_args = dict(engine_kwargs.pop("connect_args", {}))
    address = parse_dsn(source() if callable(source) else source)
    # Rows hold the users' data; an error's text need not.
    engine_kwargs.setdefault("hide_parameters", True)
    if "poolclass" not in engine_kwargs and "pool" not in engine_kwargs:
        # Overflow connections are closed when they come back, and to open one costs more than
        # the statements that it runs.
        engine_kwargs.setdefault("pool_size", 5)
        engine_kwargs.setdefault("max_overflow", 0)
    try:
        engine = create_async_engine(address.url, **engine_kwargs)
    except (TypeError, ArgumentError, ModuleNotFoundError) as exc:
        raise ConfigurationError(f"cannot make an engine: {exc}") from exc

    @event.listens_for(engine.sync_engine, "do_connect")
    def use_current_address(
        dialect: Any, connection_record: Any, cargs: Any, cparams: dict[str, Any]
    ) -> None:
        current = parse_dsn(source()) if callable(source) else address
        if current.drivername != address.drivername:
            raise ConfigurationError(
                f"the dsn callable changed the driver from {address.drivername} to "
                f"{current.drivername}; an engine has one"
            )
        for name in _FROM_URL:
            cparams.pop(name, None)
        cparams.update(current.connect_arguments(), **connect_args)

    if address.drivername == "postgresql+asyncpg":
        event.listen(engine.sync_engine, "connect", _notice_silence)
    return engine


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
