"""A worker whose tables nobody has made."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Database

APP = """
import os
from taskiq_sa_pg import SQLAlchemyBroker
broker = SQLAlchemyBroker(os.environ["TASKIQ_SA_PG_DSN"])
"""


def test_a_worker_without_tables_says_so_in_one_line(database: Database, tmp_path: Path) -> None:
    """taskiq starts it again for ever, so a traceback each time would hide what is wrong."""
    (tmp_path / "app.py").write_text(APP, "utf-8")
    command = ("-m", "taskiq", "worker", "--workers", "1", "--max-fails", "1", "app:broker")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "TASKIQ_SA_PG_DSN": database.dsn},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed, printed
    [line] = [line for line in printed.splitlines() if "the worker cannot start" in line]
    assert "table taskiq_results_queue" in line
    assert "taskiq-sa-pg upgrade --queue" in line
    assert done.returncode != 0
