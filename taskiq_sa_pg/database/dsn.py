"""Parses DSNs in all accepted forms, and converts them to the arguments of each driver."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlencode

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from taskiq_sa_pg.exceptions import ConfigurationError

Dsn = str | URL
DsnSource = Dsn | Callable[[], Dsn]

_DRIVERNAMES: Final = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "postgresql+psycopg": "postgresql+psycopg",
    "postgresql+psycopg_async": "postgresql+psycopg",
}

_UNPARSABLE: Final = (
    "dsn cannot be parsed; it must look like postgresql://user:password@host:5432/database, with "
    "special characters in user and password percent-encoded"
)

_QUERY: Final = re.compile(r"\w+=")

# Several hosts in libpq's form. SQLAlchemy would parse the second port as a part of the first.
_SEVERAL_HOSTS: Final = re.compile(
    r"(?P<head>[\w+]+://(?:[^@]*@)?)(?P<hosts>[^/?@]*,[^/?@]*)(?P<tail>[/?].*)?", re.DOTALL
)

# Names of the local machine: an empty one, loopback addresses, and the directory of a Unix socket.
_LOCAL: Final = re.compile(r"$|/|localhost$|127\.|::1$")

# Arguments of asyncpg.connect() and SQLAlchemy's asyncpg dialect that asyncpg's DSN cannot hold.
_ASYNCPG_ARGUMENTS: Final[Mapping[str, Callable[[str], Any]]] = {
    "timeout": float,
    "command_timeout": float,
    "statement_cache_size": int,
    "max_cached_statement_lifetime": int,
    "max_cacheable_statement_size": int,
    "prepared_statement_cache_size": int,
    "ssl": str,
}

# An argument of psycopg's connect(), not of libpq. None turns prepared statements off.
_THRESHOLD: Final = "prepare_threshold"

# libpq's parameters without a counterpart in asyncpg, which would send them to the server as
# settings. https://www.postgresql.org/docs/18/libpq-connect.html#LIBPQ-PARAMKEYWORDS
_OF_LIBPQ: Final = """
    channel_binding gssdelegation gssencmode hostaddr keepalives keepalives_count keepalives_idle
    keepalives_interval load_balance_hosts max_protocol_version min_protocol_version require_auth
    requirepeer requiressl scram_client_key scram_server_key sslcertmode sslcompression sslcrldir
    sslkeylogfile sslsni tcp_user_timeout
"""
_LIBPQ_ONLY: Final = frozenset(_OF_LIBPQ.split())

# After this time without an acknowledgement a connection counts as lost, idle or not. Seconds;
# milliseconds for TCP_USER_TIMEOUT, which macOS does not have.
TCP_OPTIONS: Final = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 10_000,
}

# The same for libpq, which psycopg uses.
_LIBPQ_DEFAULTS: Final = {
    "keepalives_idle": str(TCP_OPTIONS["TCP_KEEPIDLE"]),
    "keepalives_interval": str(TCP_OPTIONS["TCP_KEEPINTVL"]),
    "keepalives_count": str(TCP_OPTIONS["TCP_KEEPCNT"]),
    "tcp_user_timeout": str(TCP_OPTIONS["TCP_USER_TIMEOUT"]),
}


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed DSN. Its repr shows no secret.

    Attributes:
        drivername: SQLAlchemy's: postgresql+asyncpg or postgresql+psycopg.
        username: None is the driver's default.
        password: None is the driver's default.
        hosts: Pairs of host and port, tried in order. A host is a name, an IP address or the
            directory of a Unix socket; "" and a port of None are the driver's defaults.
        database: None is the driver's default.
        options: The other parameters, under the driver's names.
    """

    drivername: str
    username: str | None
    password: str | None = field(repr=False)
    hosts: tuple[tuple[str, int | None], ...]
    database: str | None
    options: Mapping[str, str] = field(repr=False)

    @property
    def url(self) -> URL:
        """The address without options, to show it and to choose the dialect."""
        host, port = self.hosts[0] if len(self.hosts) == 1 else (None, None)
        return URL.create(
            self.drivername, self.username, self.password, host or None, port, self.database
        )

    def may_be(self, other: "Address") -> bool:
        """Whether both can mean the same database, judged by the names of hosts and database.

        An address without a host may mean any server: PGHOST or a function may name it.
        """
        databases = {self.database, other.database} - {None}
        has_hosts = all(any(host for host, _ in each.hosts) for each in (self, other))
        return len(databases) < 2 and (not has_hosts or bool(self._servers & other._servers))

    @property
    def _servers(self) -> set[tuple[str, int]]:
        is_local = _LOCAL.match
        return {("" if is_local(host) else host, port or 5432) for host, port in self.hosts}

    def connect_arguments(self) -> dict[str, Any]:
        """Keyword arguments for the driver's connect()."""
        is_asyncpg = self.drivername == "postgresql+asyncpg"
        arguments = self._asyncpg_arguments() if is_asyncpg else self._psycopg_arguments()
        arguments.update(user=self.username, password=self.password)
        return {n: value for n, value in arguments.items() if value is not None or n == _THRESHOLD}

    def _asyncpg_arguments(self) -> dict[str, Any]:
        rest = dict(self.options)
        arguments: dict[str, Any] = {
            name: convert(rest.pop(name))
            for name, convert in _ASYNCPG_ARGUMENTS.items()
            if name in rest
        }
        if "connect_timeout" in rest:
            # 0 means no limit to libpq; to asyncpg it would mean an immediate timeout.
            arguments.setdefault("timeout", float(rest.pop("connect_timeout")) or None)
        if "fallback_application_name" in rest:
            rest.setdefault("application_name", rest.pop("fallback_application_name"))
        if rest:
            # asyncpg reads libpq's parameters only from a DSN.
            arguments["dsn"] = f"postgresql://?{urlencode(rest)}"
        arguments["database"] = self.database
        if any(host for host, _ in self.hosts):
            arguments["host"] = [host for host, _ in self.hosts]
        if len(self.hosts) == 1:
            arguments["port"] = self.hosts[0][1]
        elif any(port for _, port in self.hosts):
            arguments["port"] = [port or 5432 for _, port in self.hosts]
        return arguments

    def _psycopg_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {**_LIBPQ_DEFAULTS, **self.options, "dbname": self.database}
        if _THRESHOLD in self.options:
            text = self.options[_THRESHOLD]
            arguments[_THRESHOLD] = None if text.lower() == "none" else int(text)
        if any(host for host, _ in self.hosts):
            arguments["host"] = ",".join(host for host, _ in self.hosts)
        if any(port for _, port in self.hosts):
            arguments["port"] = ",".join(str(port or "") for _, port in self.hosts)
        return arguments


def parse_dsn(dsn: Dsn, name: str = "dsn") -> Address:
    """Parses a DSN: a libpq URI, or a SQLAlchemy URL as an object or a string.

    Args:
        dsn: The DSN.
        name: The name of the argument, for errors.

    Raises:
        ConfigurationError: Not a PostgreSQL address, a driver that is not asynchronous, or a
            parameter that the driver does not know. The text shows no part of the DSN that
            could hold a secret.
    """
    try:
        return _parse(dsn)
    except ConfigurationError as exc:
        # In every text, the first "dsn" is the name. `from None`: the original adds nothing.
        raise ConfigurationError(str(exc).replace("dsn", name, 1)) from None


def plain_address(url: URL) -> Address:
    """Parses an engine's URL, without options that only its driver knows.

    Raises:
        ConfigurationError: The URL has an unknown form.
    """
    places = {name: value for name, value in url.query.items() if name in {"host", "port"}}
    return parse_dsn(url.set(drivername="postgresql+psycopg", query=places))


def _parse(dsn: Dsn) -> Address:
    if not isinstance(dsn, str | URL):
        raise ConfigurationError(
            f"dsn must be a str, a sqlalchemy.URL or a callable, not {type(dsn).__qualname__}"
        )
    hosts: list[str] = []
    if isinstance(dsn, str):
        # SQLAlchemy would end the password at an "@" in a parameter's value.
        base, mark, query = dsn.partition("?")
        if _QUERY.match(query):
            dsn = base + mark + query.replace("@", "%40")
        elif "@" in base and "@" in query:
            raise ConfigurationError(_UNPARSABLE)  # a password with "@" and "?"
        several = _SEVERAL_HOSTS.fullmatch(dsn)
        if several:
            hosts = several["hosts"].split(",")
            dsn = several["head"] + (several["tail"] or "")
    try:
        url = make_url(dsn)
    except (ArgumentError, ValueError):
        # `from None`: the messages of SQLAlchemy and int() quote the DSN with the password.
        raise ConfigurationError(_UNPARSABLE) from None
    if "@" in (url.host or ""):
        raise ConfigurationError(_UNPARSABLE)  # the end of a password
    address = _address(url, hosts or (url.host or "").split(","))
    _check_options(address)
    return address


def _address(url: URL, hosts: list[str]) -> Address:
    drivername = _DRIVERNAMES.get(url.drivername)
    if drivername is None:
        raise ConfigurationError(
            f"dsn names the driver {url.drivername!r}, which is not supported; use postgresql:// "
            "(asyncpg) or postgresql+psycopg://"
        )
    options = {name: ",".join(values) for name, values in url.normalized_query.items()}
    # As in libpq, the query overrides.
    hosts = options.pop("host", ",".join(hosts)).split(",")
    ports = options.pop("port", str(url.port or "")).split(",")
    if len(ports) not in {1, len(hosts)}:
        raise ConfigurationError(
            f"dsn names {len(hosts)} hosts and {len(ports)} ports: name one port, or one per host"
        )
    if len(ports) == 1:
        ports *= len(hosts)
    places = tuple(map(_host_and_port, hosts, ports))
    if len(places) > 1 and not all(host for host, _ in places):
        raise ConfigurationError("dsn names several hosts, and one of them is empty")
    return Address(
        drivername,
        options.pop("user", url.username) or None,
        options.pop("password", url.password) or None,
        places,
        options.pop("dbname", options.pop("database", url.database)) or None,
        options,
    )


def _host_and_port(host: str, default_port: str) -> tuple[str, int | None]:
    port = default_port
    if host.startswith("["):
        host, _, after = host[1:].partition("]")
        port = after.removeprefix(":") or port
    elif not host.startswith("/") and host.count(":") == 1:
        host, _, own_port = host.partition(":")
        port = own_port or port
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigurationError(f"dsn has an invalid port number for host {host!r}")
    # After the port is removed: "%2Frun%2Fpostgresql:5432" is a socket's directory and a port.
    return unquote(host), int(port) if port else None


def _check_options(address: Address) -> None:
    if address.drivername == "postgresql+asyncpg":
        driver, other, foreign = "asyncpg", "psycopg", _LIBPQ_ONLY | {_THRESHOLD}
    else:
        driver, other, foreign = "psycopg", "asyncpg", frozenset(_ASYNCPG_ARGUMENTS)
    unknown = sorted(foreign.intersection(address.options))
    if unknown:
        raise ConfigurationError(
            f"{driver} does not know the dsn's parameter {', '.join(unknown)}: remove it, or use "
            f"postgresql+{other}://"
        )
    try:
        address.connect_arguments()
    except ValueError:
        numbers = ", ".join(name for name, kind in _ASYNCPG_ARGUMENTS.items() if kind is not str)
        raise ConfigurationError(
            f"the dsn's parameters {numbers} and connect_timeout must be numbers, and "
            "prepare_threshold must be a number or none"
        ) from None
