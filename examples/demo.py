"""The main job from end to end, on an embedded PostgreSQL and real worker processes.

`make demo` runs this. It provisions the database with Alembic, starts two worker processes, runs
quickstart.py, progress.py and rows.py beside this file, and stops everything, however it ends.
With TASKIQ_SA_PG_DSN set it uses that database instead of an embedded one.
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
# A worker that is idle may not notice the signal for minutes: taskiq's handler does not wake its
# event loop. Nothing is left for it to do by then.
STOP_TIMEOUT = 2


def main() -> None:
    # So that the `with` blocks below end as they do at Ctrl-C.
    signal.signal(signal.SIGTERM, interrupt)
    with ExitStack() as stack:
        if "TASKIQ_SA_PG_DSN" not in os.environ:
            say("Starting an embedded PostgreSQL")
            os.environ["TASKIQ_SA_PG_DSN"] = stack.enter_context(postgres()).dsn
        say("Making the tables: alembic -x queue=true upgrade head")
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

    Their log is kept to themselves, unless they fail to start. They have a directory for temporary
    files that ends with them, because those that are not forked leave one there when killed.
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
            start_new_session=True,  # a Ctrl-C is for us, and we stop them
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
    # What is left of their session, should the manager have died before its workers.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; everything is stopped")
    except subprocess.CalledProcessError as exc:
        sys.exit(f"failed: {exc}")
