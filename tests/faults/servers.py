"""PostgreSQL servers that can be stopped, crashed, killed and promoted, on a TCP port each."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import psutil
import psycopg

PASSWORD: Final = "a-secret-of-the-tests"

_SETTINGS: Final = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
full_page_writes = off
dynamic_shared_memory_type = mmap
max_connections = 30
wal_retrieve_retry_interval = 100
"""

# Ends the server when its standard input does: with us, however we end.
_KEEPER: Final = """
exec 3<&0
"$@" </dev/null 3<&- &
server=$!
{ read -r _ <&3; kill -INT "$server" 2>/dev/null; } &
wait "$server"
"""

_START_TIMEOUT: Final = 60


@dataclass(frozen=True)
class Programs:
    """PostgreSQL's programs, as a server on this machine has them.

    Attributes:
        bin_dir: Where they are.
        home: Where the user who runs them may make directories.
        run_as: Arguments of subprocess.Popen: that user.
    """

    bin_dir: Path
    home: Path
    run_as: Mapping[str, Any]

    @classmethod
    def of(cls, dsn: str) -> "Programs":
        query = """
            SELECT setting, current_setting('data_directory') FROM pg_config WHERE name = 'BINDIR'
        """
        with psycopg.connect(dsn) as connection:
            [(bin_dir, data)] = connection.execute(query).fetchall()
        run_as: dict[str, Any] = {"env": {"PATH": os.environ["PATH"]}, "cwd": "/"}
        if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
            owner = Path(data).stat()
            run_as |= {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": ()}
        return cls(Path(bin_dir), Path(data).parents[1], run_as)

    def run(self, name: str, *arguments: object) -> None:
        command = [self.bin_dir / name, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, **self.run_as)
        assert result.returncode == 0, result.stderr


class Server:
    """One data directory, and the server on it while it runs."""

    def __init__(self, root: Path, programs: Programs, port: int) -> None:
        self._data = root / f"data-{port}"
        self._log = root / f"log-{port}"
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port

    @property
    def dsn(self) -> str:
        return dsn_of(self.port)

    @property
    def log(self) -> str:
        """What it has logged until now, in all its lives."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def make(self, password_file: Path) -> None:
        options = "--no-sync -E UTF8 --no-locale -U postgres --auth=scram-sha-256"
        run = self._programs.run
        run("initdb", "-D", self._data, *options.split(), f"--pwfile={password_file}")
        self.configure(_SETTINGS + f"port = {self.port}\n")

    def make_standby_of(self, primary: "Server") -> None:
        """What it was before is gone."""
        self.stop()
        shutil.rmtree(self._data, ignore_errors=True)
        dsn = f"host=127.0.0.1 port={primary.port} user=postgres password={PASSWORD}"
        run = self._programs.run
        run("pg_basebackup", "-d", dsn, "-D", self._data, "-R", "-c", "fast", "--no-sync")
        self.configure(f"port = {self.port}\n")
        self.start()

    def configure(self, lines: str) -> None:
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(lines)

    def start(self) -> None:
        """Returns when it accepts connections; waits for what an earlier one has left."""
        if self._process is not None and self._process.poll() is None:
            return
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._try_to_start(deadline):
            assert time.monotonic() < deadline, self._log.read_text(errors="replace")[-2000:]

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """By SIGINT: fast; SIGQUIT: as after a crash; SIGKILL: the server process alone."""
        if self._process is None:
            return
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self._data / "postmaster.pid").read_text().split()[0]), how)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None

    def freeze(self, signal_number: signal.Signals = signal.SIGSTOP) -> None:
        """Stops all its processes in their tracks, or with SIGCONT lets them go on."""
        postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        for process in [postmaster, *postmaster.children()]:
            process.send_signal(signal_number)

    def promote(self) -> None:
        self._programs.run("pg_ctl", "promote", "-D", self._data, "-w")

    def _try_to_start(self, deadline: float) -> bool:
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                [
                    "sh",
                    "-c",
                    _KEEPER,
                    "keeper",
                    self._programs.bin_dir / "postgres",
                    "-D",
                    self._data,
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._programs.run_as,
            )
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, IndexError):
                if (self._data / "postmaster.pid").read_text().split()[-1] == "ready":
                    return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def servers(programs: Programs, count: int = 1) -> Iterator[list[Server]]:
    """Servers of which the first runs; the others have no data yet."""
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=programs.home))
    if "user" in programs.run_as:
        os.chown(root, programs.run_as["user"], programs.run_as["group"])
    password_file = root / "password"
    password_file.write_text(PASSWORD)
    password_file.chmod(0o644)
    made = [Server(root, programs, port) for port in free_ports(count)]
    try:
        made[0].make(password_file)
        made[0].start()
        yield made
    finally:
        for server in made:
            with contextlib.suppress(Exception):
                server.freeze(signal.SIGCONT)
            server.stop(signal.SIGQUIT)
        shutil.rmtree(root, ignore_errors=True)


def dsn_of(*ports: int, options: str = "") -> str:
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"postgresql://postgres:{PASSWORD}@{hosts}/postgres{options}"


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on.

    Not of those that the kernel gives to clients: they could take a server's while it is down.
    """
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            break
    return ports


async def ask(dsn: str, query: str, *arguments: object) -> list[asyncpg.Record]:
    """Runs a query past the library, on a connection of its own."""
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
        return rows
    finally:
        await connection.close()
