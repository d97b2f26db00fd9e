"""What commands print: text that no terminal obeys, and JSON for scripts."""

import json
import sys
import unicodedata
from typing import Annotated, Any

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def say(text: str) -> None:
    """Prints a text as it is, but for control characters."""
    typer.echo(printable(text))


def say_json(value: Any) -> None:
    """Prints a value as one line of JSON."""
    typer.echo(to_json(value))


def to_json(value: Any) -> str:
    """One line of JSON; what JSON cannot hold as its repr, and NaN and infinities as strings."""
    return json.dumps(_jsonable(value))


def _jsonable(value: Any, depth: int = 3) -> Any:
    try:
        jsonable = to_jsonable_python(value, fallback=repr_of, bytes_mode="base64")
        return json.loads(json.dumps(jsonable), parse_constant=str)
    except Exception:  # noqa: BLE001 - values are the users': cycles, sets as keys, odd models
        # The fields around it stay what they are.
        if depth > 0 and type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: _jsonable(item, depth - 1) for key, item in value.items()}
        return repr_of(value)


def repr_of(value: Any) -> str:
    """The value's repr, or why it has none."""
    try:
        return repr(value)
    except Exception as exc:  # noqa: BLE001 - of a class of the users', or too large a number
        return f"<{type(value).__qualname__} that cannot be shown: {type(exc).__name__}: {exc}>"


def say_table(headers: list[str], rows: list[list[str]]) -> None:
    """Prints a table; in a pipe no cell is cut."""
    columns = [Column(header, overflow="fold") for header in headers]
    table = Table(*columns, box=None, pad_edge=False, show_edge=False)
    for row in rows:
        table.add_row(*[Text(printable(cell)) for cell in row])
    drawing = console()
    with drawing.capture() as capture:
        drawing.print(table)
    # Not by rich, which ends the process itself when a pipe is closed.
    typer.echo(capture.get(), nl=False)


def console() -> Console:
    """Where commands print; without a terminal, or with NO_COLOR, without colours."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(markup=False, highlight=False, emoji=False, width=width)


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, written as escapes."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cf", "Cs"}
        else character.encode("unicode_escape").decode()
        for character in text
    )
