"""The command line against the test's own schema, in this process and in one of its own."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from taskiq import TaskiqResult
from typer.testing import Result

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.commands import run_taskiq_sa_pg
from tests.conftest import Database

PROGRAM = Path(sys.executable).with_name("taskiq-sa-pg")


@dataclass(frozen=True)
class Cli:
    """Runs `taskiq-sa-pg`, which finds the test's schema in its environment."""

    dsn: str
    listen_dsn: str = field(default="", kw_only=True)

    @property
    def environment(self) -> Mapping[str, str]:
        return {"TASKIQ_SA_PG_DSN": self.dsn, "TASKIQ_SA_PG_LISTEN_DSN": self.listen_dsn}

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> Result:
        return run_taskiq_sa_pg(*arguments, env={**self.environment, **(env or {})})

    def ok(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """What a command prints that succeeds and complains of nothing."""
        result = self.run(*arguments, env=env)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    def json(self, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
        return json.loads(self.ok(*arguments, "--json", env=env))

    def fails(self, *arguments: str, env: Mapping[str, str] | None = None, status: int = 1) -> str:
        """The one line that a command leaves that cannot be carried out."""
        result = self.run(*arguments, env=env)
        assert result.exit_code == status, result.output
        [line] = result.stderr.splitlines()
        return line

    def start(
        self, *arguments: str, stdout: int = subprocess.PIPE, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """The installed program, in a process of its own."""
        return subprocess.Popen(
            [PROGRAM, *arguments],
            env={**os.environ, **self.environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def store(
        self, work: Callable[[SQLAlchemyResultBackend[Any]], Awaitable[None]], **options: Any
    ) -> None:
        """Makes the tables, and does something with a backend on them."""

        async def do() -> None:
            backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
                self.dsn, run_migrations=True, **options
            )
            await backend.startup()
            try:
                await work(backend)
            finally:
                await backend.shutdown()

        asyncio.run(do())

    def execute(self, script: str) -> None:
        """Runs SQL."""

        async def do() -> None:
            connection = await asyncpg.connect(self.dsn)
            try:
                await connection.execute(script)
            finally:
                await connection.close()

        asyncio.run(do())


@pytest.fixture
def cli(database: Database) -> Cli:
    return Cli(database.dsn, listen_dsn=database.direct_dsn if database.is_deaf else "")


def success(value: Any, **fields: Any) -> TaskiqResult[Any]:
    return TaskiqResult(is_err=False, return_value=value, execution_time=0.5, **fields)


def failure(error: Exception) -> TaskiqResult[Any]:
    try:
        raise error
    except Exception as exc:  # noqa: BLE001 - with its traceback
        return TaskiqResult(is_err=True, return_value=None, execution_time=1.25, error=exc)
