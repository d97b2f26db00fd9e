"""Draws charts as SVG, with attributes only, because the policy allows no inline styles.

The SVG has the bars and lines, which are stretched to the page's width. Texts and numbers are in
HTML around it, so that their size does not depend on the width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log10
from typing import Final

from markupsafe import Markup

from taskiq_sa_pg.ui import formatting

# In units of the SVG, which is stretched to the available size.
WIDTH: Final = 600
HEIGHT: Final = 160

_SVG: Final = Markup(
    '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
)
_RECT: Final = Markup('<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>')
_LINE: Final = Markup('<polyline class="{}" points="{}" vector-effect="non-scaling-stroke"/>')
_GRID: Final = Markup(
    '<line class="grid" x1="0" x2="{}" y1="{}" y2="{}" vector-effect="non-scaling-stroke"/>'
)
# Covers a bucket at full height, so that the tooltip of a short bar is easy to reach.
_HINT: Final = Markup(
    '<rect class="hint" x="{:.2f}" y="0" width="{:.2f}" height="{}"><title>{}</title></rect>'
)


@dataclass(frozen=True)
class Series:
    """One data series of a chart.

    Attributes:
        name: Its name in the legend and the tooltips.
        style: Its class in style.css.
        values: One value for each bucket; None if the bucket is empty.
    """

    name: str
    style: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A drawing and the texts around it.

    Attributes:
        title: What it shows, with the unit.
        summary: One sentence for screen readers.
        svg: The drawing.
        series: The series, for the legend.
        y_labels: From top to bottom.
        x_labels: From left to right.
        is_empty: Whether there is nothing to draw.
    """

    title: str
    summary: str
    svg: Markup
    series: Sequence[Series]
    y_labels: Sequence[str]
    x_labels: Sequence[str]
    is_empty: bool


def stacked_bars(
    title: str, summary: str, series: Sequence[Series], hints: Sequence[str], x_labels: list[str]
) -> Chart:
    """Draws one bar per bucket; each series is a part of it."""
    totals = [sum(value or 0 for value in column) for column in _columns(series)]
    top = nice_top(max(totals, default=0))
    step = WIDTH / max(len(hints), 1)
    shapes: list[Markup] = []
    for number, column in enumerate(_columns(series)):
        y = float(HEIGHT)
        for one, value in zip(series, column, strict=True):
            # A value above 0 is always visible, however small it is.
            height = max(HEIGHT * (value or 0) / top, 1.5 if value else 0)
            y = max(y - height, 0.0)
            if value:
                shapes.append(_RECT.format(one.style, number * step, y, step * 0.8, height))
    return Chart(
        title,
        summary,
        _svg(summary, shapes, hints),
        series,
        [formatting.number(top), formatting.number(top / 2), "0"],
        x_labels,
        not any(totals),
    )


def lines(
    title: str, summary: str, series: Sequence[Series], hints: Sequence[str], x_labels: list[str]
) -> Chart:
    """Draws lines through the centers of buckets, in seconds; empty buckets interrupt them."""
    top = nice_seconds(max((v for one in series for v in one.values if v is not None), default=0))
    step = WIDTH / max(len(hints), 1)
    shapes: list[Markup] = []
    for one in series:
        for run in _runs(one.values):
            points = [((number + 0.5) * step, HEIGHT * (1 - v / top)) for number, v in run]
            if len(points) == 1:  # a line needs two
                points = [(points[0][0] + side * step * 0.35, points[0][1]) for side in (-1, 1)]
            path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
            shapes.append(_LINE.format(one.style, path))
    is_empty = all(value is None for one in series for value in one.values)
    labels = [formatting.duration(top), formatting.duration(top / 2), "0 s"]
    return Chart(title, summary, _svg(summary, shapes, hints), series, labels, x_labels, is_empty)


def nice_top(value: float) -> float:
    """Rounds up to 1, 2, 4, 6 or 10 times a power of ten: the top of a scale with a short half."""
    if value <= 0:
        return 1
    power = 10.0 ** ceil(log10(value) - 1)
    factor = next((f for f in (1, 2, 4, 6, 10) if f * power >= value * 0.9999), 10)
    return factor * power


def nice_seconds(value: float) -> float:
    """The same for a time span; above a minute, in steps of minutes, hours and days."""
    if value <= 60:
        return nice_top(value)
    minute, hour, day = 60, 3_600, 86_400
    steps = [n * minute for n in (1, 2, 4, 10, 20, 30, 60)]
    steps += [n * hour for n in (2, 4, 8, 12, 24)]
    return next((s for s in steps if s >= value), nice_top(value / day) * day)


def _columns(series: Sequence[Series]) -> Iterable[tuple[float | None, ...]]:
    return zip(*(one.values for one in series), strict=True)


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    runs: list[list[tuple[int, float]]] = [[]]
    for number, value in enumerate(values):
        if value is not None:
            runs[-1].append((number, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _svg(label: str, shapes: Iterable[Markup], hints: Sequence[str]) -> Markup:
    step = WIDTH / max(len(hints), 1)
    parts = [
        *(_GRID.format(WIDTH, y, y) for y in (0.5, HEIGHT / 2, HEIGHT - 0.5)),
        *shapes,
        *(_HINT.format(n * step, step, HEIGHT, text) for n, text in enumerate(hints)),
    ]
    return _SVG.format(WIDTH, HEIGHT, label, Markup("").join(parts))
