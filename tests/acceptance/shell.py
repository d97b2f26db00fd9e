"""The shell blocks of a page: Alembic's commands and our own in this process, the rest by bash."""

import asyncio
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Final

import pytest
from demo import workers

from tests.commands import run_alembic, run_taskiq_sa_pg

# Without whatever bash would understand, but for variables before the command and `> file`.
_PLAIN: Final = r"(?:'[^']*'|[^'\"|&;<>$`*])*"
_KINDS: Final = {
    "export": re.compile(rf"export (\w+)=({_PLAIN})"),
    "worker": re.compile(r"taskiq worker (.+) --workers \d+"),
    "own": re.compile(rf"((?:\w+=\S+ )*)(alembic|taskiq-sa-pg) ({_PLAIN})(?:> (\S+))?"),
}


class Shell:
    """Runs blocks in one directory; close() stops the worker that they have started."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._workers = ExitStack()

    def close(self) -> None:
        self._workers.close()

    async def run(self, source: str) -> str:
        """What a block prints; a command that fails is an error."""
        exported: dict[str, str] = {}
        printed = ""
        for kind, some in groupby(source.splitlines(), _kind_of):
            lines = list(some)
            if kind == "bash":
                printed += await self._run_bash("\n".join(lines), exported)
                continue
            for line in lines:
                match = _KINDS[kind].fullmatch(line)
                assert match is not None
                if kind == "export":
                    exported[match[1]] = "".join(shlex.split(match[2]))
                elif kind == "own":
                    printed += await asyncio.to_thread(self._run_own, match, exported)
                else:
                    await self._start_worker(match)
        return printed

    def _run_own(self, match: re.Match[str], exported: dict[str, str]) -> str:
        variables, program, arguments, file = match.groups()
        assigned = dict(word.split("=", 1) for word in shlex.split(variables))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self._directory)
            for name, value in {**exported, **assigned}.items():
                patch.setenv(name, value)
            if program == "alembic":
                printed = run_alembic(*shlex.split(arguments), ini=self._directory / "alembic.ini")
            else:
                result = run_taskiq_sa_pg(*shlex.split(arguments))
                assert result.exit_code == 0, result.output
                printed = result.stdout
        if file is None:
            return printed
        (self._directory / file).write_text(printed, "utf-8")
        return ""

    async def _run_bash(self, script: str, exported: dict[str, str]) -> str:
        environment = {**os.environ, **exported}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        process = await asyncio.create_subprocess_exec(
            *("bash", "-euo", "pipefail", "-c", script),
            cwd=self._directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        stdout, stderr = await process.communicate()
        assert process.returncode == 0, (stdout + stderr).decode()
        return stdout.decode()

    async def _start_worker(self, match: re.Match[str]) -> None:
        self.close()  # the reader has been told to stop the one before
        started = workers(*match[1].split(), cwd=self._directory, count=1, stop_timeout=0)
        await asyncio.to_thread(self._workers.enter_context, started)


def _kind_of(line: str) -> str:
    return next((kind for kind, form in _KINDS.items() if form.fullmatch(line)), "bash")
