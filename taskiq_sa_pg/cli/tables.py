"""Tables and fields: with colours and ages on a terminal, complete and exact in a pipe."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from taskiq_sa_pg.cli.output import note, printable, repr_of, say_lines

Cell = str | datetime | None

_COLOURED: Final = frozenset({"outcome", "state"})
_STYLES: Final = {
    **dict.fromkeys(("succeeded", "alive"), "green"),
    **dict.fromkeys(("failed", "lost", "silent"), "red"),
    **dict.fromkeys(("retrying", "expired", "timed out"), "yellow"),
    "started": "cyan",
}

# On a narrow terminal these columns are left out, and these are cut; task ids never are.
_SPARE: Final = frozenset({"seconds", "attempt", "deliveries"})
_CUT: Final = frozenset({"task", "worker", "queue", "error"})
_GAP: Final = 2

_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def is_terminal() -> bool:
    """Whether people read standard output."""
    return sys.stdout.isatty()


def console() -> Console:
    """Where commands draw; without a terminal, or with NO_COLOR, without colours."""
    width = None if is_terminal() else 10_000
    return Console(markup=False, highlight=False, emoji=False, width=width)


def say_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], nothing: str) -> None:
    """Prints a table; without rows, prints the note `nothing`."""
    if not rows:
        note(nothing)
        return
    texts = [[_text(*pair) for pair in zip(headers, row, strict=True)] for row in rows]
    drawing = console()
    chosen = _fitting(headers, texts, drawing.width) if is_terminal() else range(len(headers))
    columns = [_column(headers[i], [row[i] for row in texts]) for i in chosen]
    table = Table(*columns, box=None, pad_edge=False, show_edge=False)
    for row in texts:
        table.add_row(*[row[i] for i in chosen])
    _draw(drawing, table)


def say_row(headers: Sequence[str], row: Sequence[Cell]) -> None:
    """Prints one row without columns, with exact times."""
    cells = [_text(header, _exact(cell)) for header, cell in zip(headers, row, strict=True)]
    _draw(console(), Text("  ").join(cells))


def say_fields(fields: Mapping[str, Any]) -> None:
    """Prints a line for each field that has a value; a traceback comes last, as it is."""
    drawing = console()
    for name, value in fields.items():
        if value is None or name == "traceback" or (name == "labels" and not value):
            continue
        _draw(drawing, Text(f"{name + ':':<16}") + _text(name, _shown(name, value)))
    # Last, so that no line of it can be taken for a field.
    if traceback := fields.get("traceback"):
        say_lines(f"\n{traceback.rstrip()}")


def ago(at: datetime, now: datetime | None = None) -> str:
    """Such as "3 min ago", "in 2 h" or "just now"."""
    seconds = ((now or datetime.now(UTC)) - at).total_seconds()
    for size, unit in _UNITS:
        if abs(seconds) >= size:
            text = f"{int(abs(seconds) // size):,} {unit}"
            return f"{text} ago" if seconds > 0 else f"in {text}"
    return "just now"


def styled(state: str) -> Text:
    """A state or an outcome in its colour."""
    return Text(printable(state), style=_STYLES.get(state, ""))


def _text(header: str, cell: Cell) -> Text:
    if isinstance(cell, datetime):
        return Text(ago(cell) if is_terminal() else _exact(cell))
    return styled(cell or "") if header in _COLOURED else Text(printable(cell or ""))


def _exact(cell: Cell) -> str:
    return cell.isoformat(sep=" ", timespec="seconds") if isinstance(cell, datetime) else cell or ""


def _shown(name: str, value: Any) -> str:
    match value:
        case str():
            return value
        case datetime():
            return f"{_exact(value)} ({ago(value)})" if is_terminal() else str(value)
        case float() if name == "execution_time":
            return f"{value:.3f} s"
        case _:
            return repr_of(value)


def _fitting(headers: Sequence[str], texts: Sequence[Sequence[Text]], width: int) -> Sequence[int]:
    """The columns to show: not those without a value, and the spare ones if there is room."""
    widths = [max(text.cell_len for text in column) for column in zip(*texts, strict=True)]
    chosen = [i for i in range(len(headers)) if widths[i]]
    needed = sum(max(widths[i], len(headers[i])) + _GAP for i in chosen) - _GAP
    return chosen if needed <= width else [i for i in chosen if headers[i] not in _SPARE]


def _column(header: str, cells: Sequence[Text]) -> Column:
    if header in _CUT:
        return Column(header, overflow="ellipsis")
    # A minimum, because rich cuts even columns that it must not wrap.
    width = max(len(header), *(cell.cell_len for cell in cells))
    return Column(header, no_wrap=True, min_width=width)


def _draw(drawing: Console, shown: Table | Text) -> None:
    with drawing.capture() as capture:
        drawing.print(shown, soft_wrap=isinstance(shown, Text), crop=False)
    # Not by rich, which ends the process itself when a pipe is closed.
    typer.echo(capture.get(), nl=False)
