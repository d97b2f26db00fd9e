"""docs/reference/cli.md names every command and every option, and no others."""

import re
from pathlib import Path
from typing import Any

import typer

from taskiq_sa_pg.cli.app import app

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text("utf-8")
COMMANDS: dict[str, Any] = typer.main.get_group(app).commands


def options_of(command: Any) -> set[str]:
    return {name for each in command.params for name in each.opts if name.startswith("--")} - {
        "--help"
    }


def test_every_command_is_listed() -> None:
    listed = re.findall(r"^\| `([a-z-]+)[^`]*` \|", PAGE.partition("\n## ")[0], re.MULTILINE)
    assert listed == list(COMMANDS)


def test_every_option_is_listed() -> None:
    shared, own, with_json = documented_options()
    for name, command in COMMANDS.items():
        of_tables = (
            shared if name != "import-results" else shared - {"--serializer"} | {"--to-serializer"}
        )
        expected = of_tables | own.get(name, set()) | ({"--json"} if name in with_json else set())
        assert options_of(command) == expected, name


def documented_options() -> tuple[set[str], dict[str, set[str]], set[str]]:
    tables, single = (
        PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        for heading in ("Which tables", "Options of single commands")
    )
    shared = set(re.findall(r"^\| `(--[a-z-]+)` \|", tables, re.MULTILINE))
    own: dict[str, set[str]] = {}
    command = ""
    for named, options in re.findall(
        r"^\| (?:`([a-z-]+)` )?\| (`--[^|]+) \|", single, re.MULTILINE
    ):
        command = named or command
        own.setdefault(command, set()).update(re.findall(r"--[a-z-]+", options))
    [sentence] = re.findall(r"^(.+) have `--json`", single, re.MULTILINE)
    return shared, own, set(re.findall(r"`([a-z-]+)`", sentence))
