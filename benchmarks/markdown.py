"""Markdown tables, the figures in them, and their places in a page."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


class MarkersMissingError(RuntimeError):
    """A page has no place for what is to be written there."""


def replace_marked(page: Path, name: str, text: str) -> None:
    """Writes the text between the page's lines `<!-- name -->` and `<!-- /name -->`.

    Raises:
        MarkersMissingError: The page has no such lines.
    """
    check_markers(page, name)
    old = page.read_text("utf-8")
    page.write_text(_marked(name).sub(lambda _: f"\n{text}\n\n", old), "utf-8")


def check_markers(page: Path, name: str) -> None:
    """As replace_marked(), before there is a text."""
    if not _marked(name).search(page.read_text("utf-8")):
        raise MarkersMissingError(
            f"{page.name} has no lines <!-- {name} --> and <!-- /{name} --> for the table"
        )


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(f"(?<=<!-- {name} -->\n).*(?=<!-- /{name} -->)", re.DOTALL)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns whose header ends in a colon are aligned to the right."""
    names = [header.removesuffix(":") for header in headers]
    rules = ["---:" if header.endswith(":") else "---" for header in headers]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, rules, *rows))


def number(value: float) -> str:
    """Three significant digits; whole numbers from 100 on, with separators."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}"


def size(count: int) -> str:
    return f"{count // 1000} kB" if count >= 1000 else f"{count} B"
