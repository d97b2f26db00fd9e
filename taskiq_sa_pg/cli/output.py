"""What commands print: text without control characters, and JSON for scripts."""

import json
import logging
import unicodedata
from typing import Annotated, Any, Final

import typer
from pydantic_core import to_jsonable_python

# Control, format and surrogate characters, and the separators of lines and paragraphs.
_ESCAPED: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

# The largest number that a LIMIT of ours is sent as.
MAX_INT: Final = 2_147_483_647

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def say(text: str) -> None:
    """Prints a text as one line, without control characters."""
    typer.echo(printable(text))


def say_lines(text: str, *, err: bool = False) -> None:
    """Prints a text of several lines, without other control characters."""
    typer.echo("\n".join(map(printable, text.split("\n"))), err=err)


def complain(text: str) -> None:
    """Prints an error or a warning on standard error, as one line."""
    typer.echo(f"taskiq-sa-pg: {printable(text)}", err=True)


def note(text: str) -> None:
    """Prints a remark for people on standard error, so that a pipe stays empty."""
    typer.echo(printable(text), err=True)


def plural(count: int, noun: str) -> str:
    """Such as "1 result" and "1,234 results"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Warnings(logging.Handler):
    """Prints log records on standard error, such as warnings of PostgreSQL."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a message, with its traceback if there is one."""
        say_lines(self.format(record), err=True)


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


def printable(text: str) -> str:
    """The text with control characters and line ends as escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ESCAPED
        else character
        for character in text
    )
