"""Markdown tables and the figures in them."""

from collections.abc import Iterable, Sequence


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
