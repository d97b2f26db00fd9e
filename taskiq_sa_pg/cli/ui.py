"""The command that serves the dashboard."""

import errno
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict
from ipaddress import ip_address
from typing import Annotated, Any, Final

import typer
from taskiq import AsyncBroker, BrokerMessage

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.broker import SQLAlchemyBroker
from taskiq_sa_pg.cli.brokers import broker_of, started
from taskiq_sa_pg.cli.output import complain, say
from taskiq_sa_pg.cli.queue import UNDEFINED_TABLE
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import ConfigurationError, StorageError, TaskiqSaPgError
from taskiq_sa_pg.models import build_models

# Seconds for requests in progress; event streams would never end.
_GRACE: Final = 1

# Seconds until a page shows that PostgreSQL is not available.
_RETRY_TIMEOUT: Final = 3.0

_INSUFFICIENT_PRIVILEGE: Final = "42501"

_App = Callable[[Any, Any, Any], Awaitable[None]]


async def ui(
    target: Target,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Loopback address: 127.0.0.1, ::1 or localhost.")
    ] = "127.0.0.1",
    broker: Annotated[
        str | None,
        typer.Option(
            help="Your broker, as module:attribute; it sends tasks again. If it has a "
            "SQLAlchemyResultBackend, the tables of that backend are shown."
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Allow changes: run again, forget, release, discard.")
    ] = False,
) -> None:
    """Serve the dashboard on this machine.

    Ctrl-C stops it. There is no login, so it listens on the loopback address only. Every user of
    this machine can see the tasks. Without --write, nothing can be changed. To show the dashboard
    to others, mount dashboard(backend, authorize=...) into your application, behind its login.
    """
    _check_host(host)
    try:
        import uvicorn  # noqa: PLC0415 - of the extra `ui`

        from taskiq_sa_pg.ui import Permission, dashboard  # noqa: PLC0415 - so is what it imports
    except ImportError as exc:
        raise TaskiqSaPgError(
            f"the dashboard is not installed ({exc}): pip install 'taskiq-sa-pg[ui,cli]'"
        ) from exc
    with _listening(host, port) as listener:
        async with opened(target, broker, is_writing=write) as (backend, found):
            permission: Permission = "write" if write else "read"
            app = dashboard(backend, broker=found, authorize=lambda _: permission)
            port = listener.getsockname()[1]
            config = uvicorn.Config(
                OwnHostOnly(app, host, port),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="critical",  # errors of pages are logged by the dashboard itself
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE,
            )
            server = uvicorn.Server(config)
            shown = f"[{host}]" if ":" in host else host
            what = "tasks may be changed" if write else "read-only"
            say(f"The dashboard is at http://{shown}:{port}/ ({what}). Ctrl-C stops it.")
            with _ended_by_signals(server):
                await server.serve([listener])


class OwnHostOnly:
    """Answers only requests whose Host header names this server.

    Otherwise a page of any site could point its own name to the loopback address (DNS rebinding),
    and read our pages through the browser.

    Args:
        app: The application that answers accepted requests.
        host: The address on which the server listens.
        port: Its port.
    """

    def __init__(self, app: _App, host: str, port: int) -> None:
        self._app = app
        shown = f"[{host}]" if ":" in host else host
        names = {"localhost", "127.0.0.1", "[::1]", shown}
        self._hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Mapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Answers a request, or refuses it with status 403."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) == 1 and hosts[0].decode("latin-1").lower() in self._hosts:
            await self._app(scope, receive, send)
            return
        text = b"This server answers to localhost and its own address only.\n"
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": text})


def _check_host(host: str) -> None:
    try:
        is_own = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        is_own = False
    if not is_own:
        raise ConfigurationError(
            f"--host {host} is not a loopback address, and these pages have no login. To show them "
            "to others, mount dashboard(backend, authorize=...) from taskiq_sa_pg.ui into your "
            "application, behind its login"
        )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            text = f"port {port} is in use: choose another one with --port; 0 chooses a free one"
        else:
            text = f"cannot listen on port {port} of {host}: {exc.strerror or exc}"
        raise TaskiqSaPgError(text) from exc
    with listener:
        yield listener


@asynccontextmanager
async def opened(
    target: Target, broker: str | None, *, is_writing: bool
) -> AsyncIterator[tuple[SQLAlchemyResultBackend[Any], AsyncBroker | None]]:
    """The backend and the broker, both started."""
    async with AsyncExitStack() as stack:
        own = None if broker is None else broker_of(broker)
        if own is not None:
            await stack.enter_async_context(started(own))
            if isinstance(own.result_backend, SQLAlchemyResultBackend):
                yield own.result_backend, own
                return
        # Reading needs fewer privileges than storing, but the tables have to exist.
        backend = await stack.enter_async_context(
            target.backend(
                check_schema="error" if is_writing else "off",
                is_tracked=True,
                retry_timeout=_RETRY_TIMEOUT,
            )
        )
        _ = await backend.find(window=1, limit=1)
        yield backend, own or await _broker_of_queues(target, backend, stack)


class _Onlooker(SQLAlchemyBroker):
    """A broker that shows its queues, and cannot send: it does not know how to format messages."""

    async def kick(self, message: BrokerMessage) -> None:
        raise ConfigurationError(
            f"task {message.task_name} cannot be sent without your application's broker: pass "
            "--broker module:attribute"
        )


async def _broker_of_queues(
    target: Target, backend: SQLAlchemyResultBackend[Any], stack: AsyncExitStack
) -> SQLAlchemyBroker | None:
    """A started broker on the queue tables, or None if they do not exist or cannot be read.

    It shares the backend's connections.
    """
    models = build_models(**asdict(target.config), queue=True)
    broker = _Onlooker(target.dsn, models=models, check_schema="off")
    await stack.enter_async_context(started(broker.with_result_backend(backend)))
    try:
        _ = await broker.get_queues(limit=1)
    except StorageError as exc:
        if exc.sqlstate == _INSUFFICIENT_PRIVILEGE:
            complain(f"queues are not shown: {exc}")
        elif exc.sqlstate != UNDEFINED_TABLE:
            raise
        return None
    return broker


@contextmanager
def _ended_by_signals(server: Any) -> Iterator[None]:
    """Lets a signal stop the server, without reaching asyncio or Python.

    uvicorn handles signals while it serves, and sends them again when it stops.
    """

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
