"""Runs the shop until Ctrl-C: the migrations, then two worker processes and the web server.

TASKIQ_SA_PG_DSN says which database, PORT (8000) where to listen.
"""

import os
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
    # As Ctrl-C, so that the workers are stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], check=True)
    with workers():
        # Event streams have no end of their own, so a limit ends them; browsers come back.
        uvicorn.run(
            "shop.app:app",
            port=int(os.environ.get("PORT", "8000")),
            timeout_graceful_shutdown=1,
        )


@contextmanager
def workers() -> Iterator[None]:
    """Runs `taskiq worker`; it listens when the block is entered."""
    command = [sys.executable, "-m", "taskiq", "worker", "shop.tasks:broker", "--workers", "2"]
    with (
        tempfile.TemporaryDirectory(prefix="w-") as folder,  # for what they leave when killed
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
