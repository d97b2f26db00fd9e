"""A PgBouncer in front of the tests' server, for `make test-pgbouncer`."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import make_url

_VARIABLE: Final = "TASKIQ_SA_PG_PGBOUNCER"
_REMEDY: Final = (
    f"install it (Debian, Ubuntu: apt-get install pgbouncer), or set {_VARIABLE} to its executable"
)

# Parts of the names of tests that `make test-pgbouncer` leaves out, each with the reason.
NOT_THROUGH_A_POOLER: Final[Mapping[str, str]] = {
    "test_embedded.py": "is about a server of its own, without a pooler",
    "test_connections_lost.py": "ends sessions of the server's, or sees what runs in each",
    "test_a_startup_that_fails_leaves_nothing_open": "spoils the server's own address",
    "test_what_a_pooled_connection_is_told": "has the server's session listen",
    "test_an_owned_engine_is_disposed_at_shutdown": "counts the server's sessions",
    "test_without_permission_every_call_says": "takes a role by a setting that PgBouncer refuses",
    "is_one_statement": "counts the messages of a driver that prepares its statements",
    "test_a_pool_is_used_lightly": "counts the server's sessions",
    "test_closing_gives_every_connection_back": "counts the server's sessions",
    "however_busy_it_is": "counts the server's sessions",
    "test_search_ends.py": "sees what runs in the server's sessions",
    "test_cancelling_a_reader_loses_nothing": "sees what runs in the server's sessions",
    "test_cancelling_callers_leaks_no_connection": "sees what runs in the server's sessions",
    "whose_statement_was_cancelled_is_not_used": "counts the server's sessions",
    "own_time_limit_is_a_reason_to_try_again": "sets what PgBouncer refuses",
    "test_the_next_user_of_a_connection": "its settings are those of whichever server it meets",
    "test_only_a_deleting_read_opens_a_transaction": "gives a driver the other's settings",
    "test_broker_outages.py": "ends sessions of the server's, or sees what runs in each",
    "test_many_processes.py": "counts the server's sessions",
    "test_broker_sharing.py": "counts the server's sessions, or listens without a listen_dsn",
    "test_a_broker_that_is_shut_down_ends": "sees what runs in the server's sessions",
    "cli/test_importing.py": "stores with taskiq-postgres, which cannot turn off what it prepares",
    "test_the_schema_is_named": "reads the schema from the server's own address",
    "test_a_role_that_may_not_read_the_queues": "takes a role by a setting that PgBouncer refuses",
    "settings of the server's": "PgBouncer refuses those settings, which tests/pgbouncer shows",
}
NOT_IN_TRANSACTION_MODE: Final[Mapping[str, str]] = {
    "test_listening_takes_no_place_in_the_pool": "listens without a listen_dsn",
    "test_a_pool_without_places_can_listen": "listens without a listen_dsn",
    "test_the_listener_is_told": "listens without a listen_dsn",
    "test_beats.py::test_who_waits_for_a_lost_task_is_told": "listens without a listen_dsn",
    "test_a_loop_that_ends_without_shutdown_ends_the_listening": "listens without a listen_dsn",
}
NOT_IN_SESSION_MODE: Final[Mapping[str, str]] = {
    "tests/pgbouncer/": "is about transaction mode, or starts a PgBouncer for each mode",
    "test_a_connection_that_falls_silent": "tells connections apart by the server's session",
}
# How drivers' prepared statements are turned on and off.
PREPARED: Final[Mapping[str, tuple[str, Any]]] = {
    "asyncpg": ("statement_cache_size", 100),
    "psycopg": ("prepare_threshold", 5),
}
UNPREPARED: Final[Mapping[str, tuple[str, Any]]] = {
    "asyncpg": ("statement_cache_size", 0),
    "psycopg": ("prepare_threshold", None),
}

# Ends PgBouncer when its standard input does: with us, however we end. No signal but this one is
# the same to every version of it.
_KEEPER: Final = """
exec 3<&0
"$@" </dev/null 3<&- &
pooler=$!
{ read -r _ <&3; kill -KILL "$pooler" 2>/dev/null; } &
wait "$pooler"
"""

# Every test has a user of its own, whom the server gives the test's search_path; PgBouncer asks it
# for them. By turns, so that clients really change their servers.
_SETTINGS: Final = """
[databases]
* = host={server_host} port={server_port}
[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {root}
auth_type = trust
auth_file = {root}/users
auth_user = postgres
admin_users = postgres
pool_mode = {mode}
default_pool_size = {pool_size}
server_round_robin = 1
server_idle_timeout = 1
max_client_conn = 2000
"""

_PORT: Final = 6432
_PREFIX: Final = "pgbouncer-"
_FIRST_THAT_CARRIES: Final = (1, 21)
_START_TIMEOUT: Final = 30


class Pooler:
    """A running PgBouncer.

    Attributes:
        mode: How long a client keeps a server session: "transaction" or "session".
        carries: Whether it carries prepared statements from server session to server session.
        prepare: What its addresses say of prepared statements, if anything: on or off.
    """

    def __init__(self, root: Path, mode: str, carries: bool, prepare: bool | None = None) -> None:
        self._root = root
        self.mode = mode
        self.carries = carries
        self.prepare = prepare

    def preparing(self) -> "Pooler":
        """The same, whose addresses turn prepared statements on."""
        return Pooler(self._root, self.mode, self.carries, prepare=True)

    @property
    def socket(self) -> Path:
        """Where it is reached."""
        return self._root / f".s.PGSQL.{_PORT}"

    def dsn(self, user: str, driver: str = "asyncpg", *, prepare: bool | None = None) -> str:
        """Where this user reaches the server.

        Args:
            user: Whose server sessions they are.
            driver: For which driver.
            prepare: What it says of prepared statements instead of what is usual here.
        """
        parameters = f"host={self._root}&port={_PORT}"
        if prepare is None:
            prepare = self.prepare
        if prepare is not None:
            name, value = (PREPARED if prepare else UNPREPARED)[driver]
            parameters += f"&{name}={str(value).lower()}"
        scheme = "postgresql" if driver == "asyncpg" else "postgresql+psycopg"
        return f"{scheme}://{user}@/postgres?{parameters}"

    def clients(self, user: str) -> list[dict[str, Any]]:
        """What `SHOW CLIENTS` tells of this user's connections to the pooler."""
        # The console knows simple queries only.
        with psycopg.connect(
            f"host={self._root} port={_PORT} user=postgres dbname=pgbouncer",
            autocommit=True,
            cursor_factory=psycopg.ClientCursor[dict[str, Any]],
            row_factory=dict_row,
        ) as console:
            rows = console.execute("SHOW CLIENTS").fetchall()
        return [row for row in rows if row["user"] == user]


def left_out(mode: str) -> list[str]:
    """Parts of the names of the tests that do not run in this mode."""
    in_mode = {"transaction": NOT_IN_TRANSACTION_MODE, "session": NOT_IN_SESSION_MODE}
    return [*NOT_THROUGH_A_POOLER, *in_mode[mode]]


def is_pooled(dsn: str) -> bool:
    """Whether an address leads through one of these."""
    return f"/{_PREFIX}" in unquote(dsn)


@contextlib.contextmanager
def pgbouncer(
    server_dsn: str,
    *,
    mode: str = "transaction",
    pool_size: int | None = None,
    carries: bool = True,
) -> Iterator[Pooler]:
    """A PgBouncer in front of a server that trusts local users, on a Unix socket of its own.

    Args:
        server_dsn: The server, on a Unix socket.
        mode: As of the pooler.
        pool_size: How many server sessions each user has; else as many as the tests need.
        carries: Whether it carries prepared statements, where it can.
    """
    executable = _find()
    version = _version_of(executable)
    carries = carries and version >= _FIRST_THAT_CARRIES
    server = {"port": "5432", **make_url(server_dsn).query}
    # Where every user can reach it, and the path of a socket is short enough.
    root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    settings = _SETTINGS.format(
        server_host=server["host"],
        server_port=server["port"],
        port=_PORT,
        root=root,
        mode=mode,
        # In session mode one for each connection of a test.
        pool_size=pool_size or {"transaction": 5, "session": 40}[mode],
    )
    if version >= _FIRST_THAT_CARRIES:
        # By default it carries them since 1.24.
        settings += f"max_prepared_statements = {200 if carries else 0}\n"
    (root / "users").write_text('"postgres" ""\n')
    (root / "settings").write_text(settings)
    run_as: dict[str, Any] = {}
    if os.geteuid() == 0:  # as which it refuses to run
        owner = Path(f"{server['host']}/.s.PGSQL.{server['port']}").stat()
        run_as = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": ()}
        for path in (root, *root.iterdir()):
            os.chown(path, owner.st_uid, owner.st_gid)
    with (root / "log").open("ab") as log:
        process = subprocess.Popen(
            ["sh", "-c", _KEEPER, "keeper", executable, root / "settings"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            **run_as,
        )
    try:
        _await_ready(root, process)
        yield Pooler(root, mode, carries)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        shutil.rmtree(root, ignore_errors=True)


def _await_ready(root: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while not (root / f".s.PGSQL.{_PORT}").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            log = (root / "log").read_text(errors="replace")[-2000:]
            raise pytest.UsageError(f"PgBouncer did not start:\n{log}")
        time.sleep(0.01)


def _find() -> str:
    given = os.environ.get(_VARIABLE)
    # Where Debian puts it, /usr/sbin, is not in every user's PATH.
    found = given or shutil.which("pgbouncer", path=f"{os.environ.get('PATH')}:/usr/sbin")
    if found is None:
        raise pytest.UsageError(f"no PgBouncer found: {_REMEDY}")
    if not os.access(found, os.X_OK):
        raise pytest.UsageError(f"{found} is no executable: {_REMEDY}")
    return str(Path(found).absolute())


def _version_of(executable: str) -> tuple[int, int]:
    said = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"(\d+)\.(\d+)", said.stdout)
    assert version is not None, said.stdout
    return int(version[1]), int(version[2])
