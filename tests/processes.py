"""Processes that the tests start, and what they may leave behind."""

import signal
from contextlib import suppress
from pathlib import Path

import psutil


def heed_interrupts() -> None:
    """For `preexec_fn`: a shell's background job inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes_of(temporary_directory: Path) -> list[str]:
    """The processes that have this TMPDIR, or one in it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR", "").startswith(str(temporary_directory)):
                found.append(" ".join(process.cmdline()))
    return found
