"""Alembic's commands and those of `taskiq-sa-pg`, in this process: one of their own takes a second.

Not two at once: Alembic's `op` and `context` are global.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.config import CommandLine, Config
from typer.testing import CliRunner, Result

from taskiq_sa_pg.cli.app import app
from taskiq_sa_pg.schema.migrate import script_location


@contextmanager
def only_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Of the TASKIQ_SA_PG_* variables there are these alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TASKIQ_SA_PG_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def run_alembic(
    *arguments: str,
    ini: Path | None = None,
    location: str | None = None,
    printed: io.StringIO | None = None,
) -> str:
    """What a command prints.

    Args:
        arguments: The command.
        ini: The file that it would read.
        location: Without one, where the migrations are: ours, if nothing is said.
        printed: Gets it, too.

    Raises:
        CommandError: It fails.
    """
    line = CommandLine()
    options: Any = line.parser.parse_args(arguments)
    printed = io.StringIO() if printed is None else printed
    config = Config(
        ini, ini_section=options.name, output_buffer=printed, stdout=printed, cmd_opts=options
    )
    if ini is None:
        config.set_main_option("script_location", location or script_location())
    function, positional, named = options.cmd
    function(
        config,
        *[getattr(options, name) for name in positional],
        **{name: getattr(options, name, None) for name in named},
    )
    return printed.getvalue()


def run_taskiq_sa_pg(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    """What a command prints, and its exit status."""
    return CliRunner().invoke(app, list(arguments), env=env)
