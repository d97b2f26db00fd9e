"""Where a database is, for error messages, log lines and repr(): without user and password."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from taskiq_sa_pg.database.dsn import Address, Dsn, DsnSource, parse_dsn, plain_address
from taskiq_sa_pg.exceptions import ConfigurationError


class Place:
    """The hosts, ports and database that a DSN or an engine leads to.

    str() of it is `host:port/database`; commas separate several hosts. It is empty until a callable
    has returned the DSN.

    Args:
        source: The DSN, a callable that returns it, or an engine.
        connect_args: Arguments of the driver's connect(), which override the DSN.
    """

    def __init__(
        self, source: DsnSource | AsyncEngine, connect_args: Mapping[str, Any] | None = None
    ) -> None:
        self._connect_args = dict(connect_args or ())
        self._is_engine = isinstance(source, AsyncEngine)
        self._address: Address | None = None
        if isinstance(source, AsyncEngine):
            with suppress(ConfigurationError):  # a URL of a form that only its driver knows
                self._address = plain_address(source.url)
        elif not callable(source):
            self._note(source)

    @property
    def servers(self) -> str:
        """The hosts with their ports; empty if they are not known."""
        if self._address is None:
            return ""
        places = self._address.hosts
        if self._is_engine and not places[0][0]:
            return ""  # an engine may have the host in connect_args, which cannot be read
        default = "5432" if any(port for _, port in places) else os.environ.get("PGPORT", "5432")
        if not places[0][0]:  # as both drivers do
            places = ((os.environ.get("PGHOST") or "default host", places[0][1]),)
        return ",".join(_server(host, str(port or default)) for host, port in places)

    def __str__(self) -> str:
        database = None if self._address is None else self._address.database
        return "/".join(filter(None, (self.servers, database)))

    def noting(self, source: DsnSource) -> DsnSource:
        """The same source; the place follows the DSNs that a callable returns."""
        if not callable(source):
            return source

        def noted() -> Dsn:
            dsn = source()
            self._note(dsn)
            return dsn

        return noted

    def _note(self, dsn: Dsn) -> None:
        with suppress(ConfigurationError):  # which connecting raises
            address = parse_dsn(dsn)
            parts = {
                "host": ",".join(host for host, _ in address.hosts),
                "port": ",".join(str(port or "") for _, port in address.hosts),
                "dbname": address.database or "",
            }
            for name, value in self._connect_args.items():
                part = "dbname" if name == "database" else name
                if part in parts and value is not None:
                    is_list = isinstance(value, list | tuple)
                    parts[part] = ",".join(map(str, value)) if is_list else str(value)
            self._address = parse_dsn(URL.create("postgresql+psycopg", query=parts))


def _server(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def repr_at(name: str, table: str, place: str) -> str:
    """The repr() of a `name` that works on a table: `<name table on host:port/database>`."""
    return f"<{name} {table} on {place}>" if place else f"<{name} {table}>"
