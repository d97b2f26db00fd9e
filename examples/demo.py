"""Runs the other examples on an embedded PostgreSQL with real worker processes.

`make demo` runs this. It creates the tables with Alembic, starts two worker processes, runs
quickstart.py, progress.py and rows.py, and always stops everything at the end. If TASKIQ_SA_PG_DSN
is set, it uses that database instead of an embedded one.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from taskiq_sa_pg.embedded import postgres

EXAMPLES = Path(__file__).parent
ROOT = EXAMPLES.parent
WORKERS = 2
START_TIMEOUT = 60
# An idle worker may not notice the signal for minutes, because taskiq's handler does not wake its
# event loop. It has nothing left to do then.
STOP_TIMEOUT = 2


def main() -> None:
    # So that the `with` blocks below end as after Ctrl-C.
    signal.signal(signal.SIGTERM, interrupt)
    with ExitStack() as stack:
        if "TASKIQ_SA_PG_DSN" not in os.environ:
            say("Starting an embedded PostgreSQL")
            os.environ["TASKIQ_SA_PG_DSN"] = stack.enter_context(postgres()).dsn
        say("Creating the tables: alembic -x queue=true upgrade head")
        run("-m", "alembic", "-x", "queue=true", "upgrade", "head", cwd=ROOT)
        say(f"Starting {WORKERS} worker processes: taskiq worker quickstart:broker progress")
        stack.enter_context(workers("quickstart:broker", "progress", cwd=EXAMPLES))
        for example in ("quickstart.py", "progress.py", "rows.py"):
            say(f"python {example}")
            run(example, cwd=EXAMPLES)
        say("Stopping")


def interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def say(text: str) -> None:
    print(f"\n# {text}", flush=True)


def run(*command: str, cwd: Path) -> None:
    subprocess.run([sys.executable, *command], cwd=cwd, check=True, stdin=subprocess.DEVNULL)


@contextmanager
def workers(
    *targets: str, cwd: Path, count: int = WORKERS, stop_timeout: float = STOP_TIMEOUT
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `taskiq worker` on the targets; its processes listen when the block is entered.

    Their log is printed only if they fail to start. They get their own directory for temporary
    files, because worker processes that are not forked leave files there when they are killed.
    """
    command = [sys.executable, "-m", "taskiq", "worker", *targets, "worker_log", "-w", str(count)]
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(EXAMPLES))))
    with (
        tempfile.TemporaryDirectory(prefix="w-") as folder,
        Path(folder, "log").open("wb") as log,
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes only to this process, which stops them
        ) as process,
    ):
        try:
            wait_until_listening(process, Path(log.name), count)
            yield process
        finally:
            stop(process, stop_timeout)


def wait_until_listening(process: subprocess.Popen[bytes], log: Path, count: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while log.read_text().count("Listening started") < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the workers did not start:\n{log.read_text()}")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes], timeout: float) -> None:
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
    # If the manager died first, its workers are still in the session.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; everything is stopped")
    except subprocess.CalledProcessError as exc:
        sys.exit(f"failed: {exc}")
