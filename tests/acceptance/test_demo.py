"""The examples, run as `make demo` runs them, and as docs/quickstart.md shows them."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import workers

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend
from tests.acceptance.documents import ROOT, blocks_of, comparable
from tests.conftest import Database
from tests.processes import heed_interrupts, processes_of


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo, on an embedded server whose traces would be in an empty TMPDIR."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    environment.pop("TASKIQ_SA_PG_DSN", None)
    tmp_path.chmod(0o777)
    with subprocess.Popen(
        [sys.executable, ROOT / "examples" / "demo.py"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - no threads
    ) as process:
        yield process
        process.kill()


def test_the_demo_prints_the_result_the_progress_and_the_rows(
    demo: subprocess.Popen[str], tmp_path: Path
) -> None:
    page = blocks_of(ROOT / "docs/quickstart.md")
    worker, command, output = [block.source for block in page if block.mark == "run by"]
    printed, _ = demo.communicate(timeout=110)
    assert demo.returncode == 0
    assert worker.partition(" --workers")[0] in printed
    for line, shown in {"python quickstart.py": "42", command.strip(): output}.items():
        printed_by_it = printed.partition(f"# {line}\n")[2].partition("\n# ")[0]
        assert comparable(printed_by_it) == comparable(shown)
    assert re.search(r"execution_time=4\.\d+ ", printed)
    assert re.search(r"^Result\(task_id='\w+', is_err=False\) took 4\.\d+ s", printed, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_demo_leaves_nothing_behind(
    demo: subprocess.Popen[str], tmp_path: Path
) -> None:
    """By what is handled as a Ctrl-C is."""
    assert demo.stdout is not None
    # Not as soon as the demo says so: it may be about to start it.
    for line in demo.stdout:
        if line.startswith("state="):  # progress.py's
            break
    demo.send_signal(signal.SIGTERM)
    demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_workers_that_are_not_forked_are_noticed_too(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of Python 3.14 on Linux, where taskiq 0.13 leaves them without a log."""
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('forkserver')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TASKIQ_SA_PG_DSN", database.dsn)
    asyncio.run(create_tables(database.dsn))
    with workers("quickstart:broker", cwd=ROOT / "examples", count=1, stop_timeout=0):
        command = [sys.executable, "quickstart.py"]
        printed = subprocess.check_output(command, cwd=ROOT / "examples", text=True)
    assert printed == "42\n"


async def create_tables(dsn: str) -> None:
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(dsn, run_migrations=True)
    broker = SQLAlchemyBroker(dsn, run_migrations=True).with_result_backend(backend)
    await broker.startup()
    await broker.shutdown()
