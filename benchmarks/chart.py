"""The chart of calls per second by callers."""

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from benchmarks.contenders import ASYNCPG_PEER, OURS, PSYCOPG_PEER
from benchmarks.floor import BATCHES, PREPARED
from benchmarks.markdown import size
from benchmarks.results import Results
from benchmarks.throughput import CALLERS, OPERATIONS

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

_PAYLOAD_BYTES: Final = 200
_STYLES: Final[dict[str, dict[str, Any]]] = {
    OURS.name: {"color": "#0b6e99", "marker": "o", "linewidth": 2.5},
    ASYNCPG_PEER.name: {"color": "#d1622b", "marker": "s"},
    PSYCOPG_PEER.name: {"color": "#8a6d3b", "marker": "^"},
    f"bare asyncpg, {PREPARED}": {"color": "#777777", "linestyle": ":", "marker": "x"},
    f"bare asyncpg, {BATCHES}": {"color": "#777777", "linestyle": "--"},
}


def draw(results: Results, directory: Path) -> None:
    """Writes throughput.png and throughput.svg, the same bytes for the same results."""
    with mpl.rc_context({"svg.hashsalt": "taskiq_sa_pg", "font.size": 10}):
        figure, axes = plt.subplots(
            2, 2, figsize=(10, 8), sharex=True, sharey=True, layout="constrained"
        )
        for panel, operation in zip(axes.flat, OPERATIONS, strict=True):
            _draw_operation(results, operation, panel)
        # All contenders are in the first panel only.
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(f"Calls per second by concurrent callers, {size(_PAYLOAD_BYTES)} payload")
        figure.savefig(directory / "throughput.png", dpi=150, metadata={"Software": None})
        figure.savefig(directory / "throughput.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _draw_operation(results: Results, operation: str, panel: Any) -> None:
    for label, style in _STYLES.items():
        contender = label.removeprefix("bare asyncpg, ")
        points = [
            (each.callers, each.per_second)
            for each in results.throughput
            if (each.operation, each.contender, each.payload_bytes)
            == (operation, contender, _PAYLOAD_BYTES)
        ]
        if points:
            panel.plot(*zip(*points, strict=True), label=label, **style)
    callers = CALLERS[_PAYLOAD_BYTES]
    panel.set_title(operation)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(callers, [f"{each:,}" for each in callers])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.grid(alpha=0.3)
