"""The chart of calls per second by callers."""

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from benchmarks.contenders import OURS, PEER, PSYCOPG_PEER, REDIS_PEER, Contender
from benchmarks.markdown import size
from benchmarks.results import Results
from benchmarks.throughput import CALLERS, OPERATIONS, SMALL, Scenario

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

_STYLES: Final[dict[Contender, dict[str, Any]]] = {
    OURS: {"color": "#0b6e99", "marker": "o", "linewidth": 2.5},
    PEER: {"color": "#d1622b", "marker": "s"},
    PSYCOPG_PEER: {"color": "#8a6d3b", "marker": "^"},
    REDIS_PEER: {"color": "#777777", "marker": "D", "linestyle": "--"},
}


def draw(results: Results, path: Path) -> None:
    """Writes a PNG, the same bytes for the same results."""
    figure, axes = plt.subplots(
        2, 2, figsize=(10, 8), sharex=True, sharey=True, layout="constrained"
    )
    for panel, operation in zip(axes.flat, OPERATIONS, strict=True):
        _draw_operation(results, operation, panel)
    # All backends are in every panel.
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Throughput by concurrent callers, {size(SMALL)} values (higher is better)")
    for panel in axes[-1]:
        panel.set_xlabel("concurrent callers (log scale)")
    for panel in axes[:, 0]:
        panel.set_ylabel("calls per second (log scale)")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _draw_operation(results: Results, operation: str, panel: Any) -> None:
    for contender in results.contenders:
        rates = [
            results.throughput[Scenario(operation, callers), contender].per_second
            for callers in CALLERS
        ]
        panel.plot(CALLERS, rates, label=contender.name, **_STYLES[contender])
    panel.set_title(operation)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(CALLERS, [f"{each:,}" for each in CALLERS])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.grid(alpha=0.3)
