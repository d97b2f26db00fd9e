"""The examples, run as `make demo` runs them."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import heed_interrupts, processes_of

ROOT = Path(__file__).parents[2]


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
    printed, _ = demo.communicate(timeout=110)
    assert demo.returncode == 0
    assert [line for line in printed.splitlines() if line and not line.startswith("#")][:3] == [
        "42",
        "state='STARTED' meta={'start_message': 'Starting to solve problems'}",
        "state='STARTED' meta={'start_message': 'Starting to solve problems', "
        "'halfway_message': 'Halfway done!'}",
    ]
    assert re.search(
        r"^is_err=False log=None return_value=42 execution_time=4\.\d+ labels={} error=None$",
        printed,
        re.MULTILINE,
    )
    assert re.search(r"^Result\(task_id='\w+', is_err=False\) took 4\.\d+ s", printed, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("interruption", "during"),
    [(signal.SIGINT, "# Making the tables"), (signal.SIGTERM, "# python quickstart.py")],
)
def test_an_interrupted_demo_leaves_nothing_behind(
    demo: subprocess.Popen[str], tmp_path: Path, interruption: signal.Signals, during: str
) -> None:
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith(during):
            break
    demo.send_signal(interruption)
    demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []
