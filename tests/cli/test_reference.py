"""docs/reference/cli.md names every command and every option, and no others."""

import re
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from taskiq_sa_pg.cli.app import COMMANDS as PLACES
from taskiq_sa_pg.cli.app import app, load

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text("utf-8")
COMMANDS: dict[str, Any] = {name: load(name) for name in PLACES}


def options_of(command: Any) -> set[str]:
    return {name for each in command.params for name in each.opts if name.startswith("--")} - {
        "--help"
    }


def test_every_command_is_listed() -> None:
    listed = re.findall(r"^\| `([a-z-]+)[^`]*` \|", PAGE.partition("\n## ")[0], re.MULTILINE)
    assert listed == list(COMMANDS)


def test_every_argument_is_named_as_in_the_list() -> None:
    listed = re.findall(r"^\| `([a-z-]+) ?([^`]*)` \|", PAGE.partition("\n## ")[0], re.MULTILINE)
    for name, arguments in listed:
        command = COMMANDS[name]
        _, *pieces = command.collect_usage_pieces(
            command.make_context(name, [], resilient_parsing=True)
        )
        assert re.sub("[{}]", "", " ".join(pieces)) == arguments, name


def test_every_option_is_listed() -> None:
    shared, own, with_json = documented_options()
    for name, command in COMMANDS.items():
        of_tables = (
            shared if name != "import-results" else shared - {"--serializer"} | {"--to-serializer"}
        )
        expected = of_tables | own.get(name, set()) | ({"--json"} if name in with_json else set())
        assert options_of(command) == expected, name


def test_every_whole_number_is_bounded() -> None:
    """As by PostgreSQL, whose error for a larger one would not name the option."""
    numbers = {
        (command, name): option
        for command, (place, _) in PLACES.items()
        for name, hint in hints_of(place).items()
        for kinds, option in [(get_args(hint)[0], get_args(hint)[-1])]
        if kinds is int or int in get_args(kinds)
    }
    assert len(numbers) == 8
    for option in numbers.values():
        assert option.max <= 2_147_483_647


def hints_of(place: str) -> dict[str, Any]:
    """What the options of a command are annotated with."""
    module, function = place.split(":")
    found = getattr(import_module(f"taskiq_sa_pg.cli.{module}"), function)
    hints = get_type_hints(found, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is Annotated}


def test_the_list_of_commands_has_the_first_sentence_of_each_help() -> None:
    assert list(typer.main.get_group(app).commands) == list(PLACES)
    for name, (_, sentence) in PLACES.items():
        assert COMMANDS[name].help.splitlines()[0] == sentence
        assert len(sentence) <= 50, name


def documented_options() -> tuple[set[str], dict[str, set[str]], set[str]]:
    tables, single, output = (
        PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        for heading in ("Which tables", "Options of single commands", "Output")
    )
    shared = set(re.findall(r"^\| `(--[a-z-]+)` \|", tables, re.MULTILINE))
    own: dict[str, set[str]] = {}
    command = ""
    for named, options in re.findall(
        r"^\| (?:`([a-z-]+)` )?\| (`--[^|]+) \|", single, re.MULTILINE
    ):
        command = named or command
        own.setdefault(command, set()).update(re.findall(r"--[a-z-]+", options))
    [sentence] = re.findall(r"^(.+) have `--json`", output, re.MULTILINE)
    return shared, own, set(re.findall(r"`([a-z-]+)`", sentence))
