"""ui: the dashboard served by the command itself."""

import asyncio
import http.client
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from taskiq.exceptions import SendTaskError
from taskiq.kicker import AsyncKicker

from taskiq_sa_pg import SQLAlchemyBroker
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.cli.ui import opened
from tests.cli.conftest import Cli
from tests.conftest import Database
from tests.tasks import new_id

APP = """
import os
from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend
dsn = os.environ["TASKIQ_SA_PG_DSN"]
backend = SQLAlchemyResultBackend(dsn, run_migrations=True, track="started")
broker = SQLAlchemyBroker(dsn, run_migrations=True).with_result_backend(backend)
no_broker = 5
def fails(): raise LookupError("not today")
"""


class Server:
    """A running `taskiq-sa-pg ui`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.said = process.stdout.readline()
        found = re.search(r"http://([\d.]+|\[::1\]):(\d+)/", self.said)
        assert found, (self.said, process.communicate(timeout=20))
        self.host, self.port = found[1].strip("[]"), int(found[2])

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        """The status and the text of an answer."""
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=20)) as connection:
            response = _asked(connection, path, method, headers)
            return response.status, response.read().decode()


def _asked(
    connection: http.client.HTTPConnection, path: str, method: str, headers: dict[str, str]
) -> http.client.HTTPResponse:
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in {**headers, "Content-Length": "0"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


@contextmanager
def running(cli: Cli, cwd: Path, *arguments: str) -> Iterator[Server]:
    process = cli.start(*arguments, cwd=cwd)
    try:
        yield Server(process)
    finally:
        process.kill()
        _ = process.communicate()


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(APP, "utf-8")
    return tmp_path


def test_the_real_command_serves_until_it_is_interrupted(cli: Cli, app: Path) -> None:
    """Pages, the refusal of foreign hosts, changes with --write, and Ctrl-C in mid-stream."""
    arguments = ("ui", "--port", "0", "--broker", "shop:broker", "--write")
    with running(cli, app, *arguments) as server:
        assert "tasks may be changed" in server.said
        own = f"http://127.0.0.1:{server.port}"
        for path, word in (("/", "Overview"), ("/queues", "Queues"), ("/parked", "parked")):
            status, text = server.ask(path)
            assert (status, word in text) == (200, True), text
        cli.execute(
            "INSERT INTO taskiq_results_queue (task_id, task_name, message, available_at) "
            "VALUES ('x', 't', '', 'infinity');"
            "INSERT INTO taskiq_results_status (task_id, state) VALUES ('waits', 'queued')"
        )
        for host in (f"localhost:{server.port}", f"LOCALHOST:{server.port}"):
            assert server.ask("/", Host=host)[0] == 200
        for host in ("evil.test", f"evil.test:{server.port}", "localhost", "127.0.0.1:1", ""):
            status, text = server.ask("/parked", Host=host)
            assert (status, "own address only" in text) == (403, True), host
            assert server.ask("/release?id=x", "POST", Host=host, Origin=own)[0] == 403
        assert server.ask("/release?id=x", "POST", Origin="http://evil.test")[0] == 403
        assert server.ask("/release?id=x", "POST", Origin=own)[0] == 303
        assert cli.json("queue")["waiting"] == 1
        stream = http.client.HTTPConnection(server.host, server.port, timeout=20)
        with closing(stream), _asked(stream, "/follow?id=waits", "GET", {}) as events:
            assert events.headers["Content-Type"].startswith("text/event-stream")
            server.process.send_signal(signal.SIGINT)
            printed = server.process.communicate(timeout=20)
        assert (server.process.returncode, *printed) == (0, "", "")


def test_it_is_read_only_and_needs_no_broker(cli: Cli, app: Path) -> None:
    """It shows queues where there are tables of them; also on IPv6, ended as a supervisor does."""
    cli.ok("upgrade", "--queue")
    with running(cli, app, "ui", "--port", "0", "--host", "::1") as server:
        assert "read-only" in server.said
        assert server.host == "::1"
        status, text = server.ask("/")
        assert status == 200
        assert "read only" in text
        assert server.ask("/queues")[0] == 200
        own = f"http://[::1]:{server.port}"
        assert server.ask("/forget?id=x", "POST", Origin=own)[0] == 403
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0


@pytest.mark.parametrize("host", ["::", "10.0.0.1", "192.168.1.5", "example.com", "127.0.0.1x"])
def test_other_hosts_are_refused_with_the_way_to_have_them(cli: Cli, host: str) -> None:
    line = cli.fails("ui", "--host", host, status=2)
    assert line.startswith(f"taskiq-sa-pg: --host {host} is not a loopback address")
    assert "mount dashboard(backend, authorize=...)" in line


def test_a_port_in_use_is_told(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = cli.fails("ui", "--port", str(port))
    assert line.startswith(f"taskiq-sa-pg: port {port} is in use: choose another one with --port")


def test_without_its_extra_the_remedy_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'taskiq-sa-pg[ui,cli]'" in cli.fails("ui")


def test_without_tables_the_remedy_is_told(cli: Cli) -> None:
    assert "taskiq-sa-pg upgrade" in cli.fails("ui", "--port", "0")
    assert "taskiq-sa-pg upgrade" in cli.fails("ui", "--port", "0", "--write")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere:broker", "No module named 'nowhere'"),
        ("shop:nothing", "nothing"),
        ("shop:fails", "not today"),
        ("shop:no_broker", "is not a taskiq broker: 5"),
        ("shop", "module:attribute"),
    ],
)
def test_what_is_no_broker_is_named(
    cli: Cli, app: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(app)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TASKIQ_SA_PG_DSN", cli.dsn)
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    line = cli.fails("ui", "--port", "0", "--broker", name, status=2)
    assert f"--broker {name}" in line
    assert reason in line


async def test_a_broker_that_is_not_named_shows_queues_and_sends_nothing(cli: Cli) -> None:
    await asyncio.to_thread(cli.ok, "upgrade")
    target = Target(cli.dsn)
    async with opened(target, None, is_writing=True) as (_, broker):
        assert broker is None, "there are no tables of queues"
    await asyncio.to_thread(cli.ok, "upgrade", "--queue")
    async with opened(target, None, is_writing=True) as (backend, broker):
        assert isinstance(broker, SQLAlchemyBroker)
        assert await broker.get_queues() == []
        assert broker.runtime.database is backend.database
        with pytest.raises(SendTaskError) as caught:
            await AsyncKicker("t", broker, {}).kiq()
        assert "--broker module:attribute" in str(caught.value.__cause__)


async def test_a_role_that_may_not_read_the_queues_sees_the_results(
    cli: Cli, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    await asyncio.to_thread(cli.ok, "upgrade", "--queue")
    role = f"reader_{new_id()}"
    await database.fetch(f"CREATE ROLE {role}")
    await database.fetch(f"GRANT USAGE ON SCHEMA {database.schema} TO {role}")
    await database.fetch(f"GRANT SELECT ON taskiq_results TO {role}")
    try:
        target = Target(f"{cli.dsn}%20-c%20role%3D{role}")
        async with opened(target, None, is_writing=False) as (backend, broker):
            assert (await backend.find()).records == []
        assert broker is None
    finally:
        await database.fetch(f"DROP OWNED BY {role}")
        await database.fetch(f"DROP ROLE {role}")
    assert "queues are not shown: " in capsys.readouterr().err
