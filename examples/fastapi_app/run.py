"""Runs the shop until Ctrl-C: the migrations, then two worker processes and the web server.

Environment variables: TASKIQ_SA_PG_DSN is the database, PORT (8000) the port of the web server, and
ADMIN_PASSWORD the password of the dashboard. If that is not set, one is generated and printed.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

import uvicorn


def main() -> None:
    if "TASKIQ_SA_PG_DSN" not in os.environ:
        sys.exit("which database? Set TASKIQ_SA_PG_DSN to postgresql://user:password@host/database")
    os.chdir(Path(__file__).parent)
    # As after Ctrl-C, so that the workers are stopped as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], check=True)
    port = int(os.environ.get("PORT", "8000"))
    login = "user admin, password of ADMIN_PASSWORD"
    if "ADMIN_PASSWORD" not in os.environ:
        os.environ["ADMIN_PASSWORD"] = secrets.token_urlsafe(9)
        login = f"user admin, password {os.environ['ADMIN_PASSWORD']}"
    with workers():
        shop = f"http://127.0.0.1:{port}/"
        print(f"The shop: {shop}", flush=True)
        print(f"Its dashboard: {shop}admin/ ({login})", flush=True)
        uvicorn.run("shop.app:app", port=port)


@contextmanager
def workers() -> Iterator[None]:
    """Runs `taskiq worker`; it listens when the block is entered."""
    command = [sys.executable, "-m", "taskiq", "worker", "shop.tasks:broker", "--workers", "2"]
    with (
        tempfile.TemporaryDirectory(prefix="w-") as folder,  # workers leave files when killed
        subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": folder},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            assert process.stderr is not None
            show(process.stderr, until="Listening started")
            Thread(target=show, args=[process.stderr], daemon=True).start()
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)  # an idle worker does not notice the signal
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def show(log: IO[str], until: str | None = None) -> None:
    for line in log:
        sys.stderr.write(line)
        if until is not None and until in line:
            return
    if until is not None:
        sys.exit("the workers did not start")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; everything is stopped")
    except subprocess.CalledProcessError as exc:
        sys.exit(f"failed: {exc}")
