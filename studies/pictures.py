"""The picture of a report for docs: what was learned against what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drawing import MUTED, finish, frame, look, page, themed
from matplotlib.figure import Figure

from keeptune.report.estimates import methods, over, yardstick
from keeptune.report.numbers import listing, short
from keeptune.report.records import as_report

__all__ = ["tradeoff"]


def tradeoff(report: Mapping[str, Any]) -> Figure:
    """Returns what was learned against what was kept, means over seeds with 95% intervals; up and right is better."""
    parsed = as_report(report)
    knowledge, task = yardstick(parsed, "knowledge"), yardstick(parsed, "task")
    with themed():
        figure = page(7.6, 4.8)
        axes = figure.subplots()
        axes.axhline(100, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for index, method in enumerate(methods(parsed)):
            x, y, drawn = over(method, "learned", task), over(method, "kept", knowledge), look(index)
            if x is None or y is None:
                continue
            axes.plot([x.low, x.high], [y.mean] * 2, color=drawn.colour, lw=1, alpha=0.6)
            axes.plot([x.mean] * 2, [y.low, y.high], color=drawn.colour, lw=1, alpha=0.6)
            style: dict[str, Any] = {"color": drawn.colour, "mec": "white", "ms": 9, "zorder": 4}
            axes.plot([x.mean], [y.mean], drawn.shape, label=short(method.label), **style)
        across = f"learned: {listing([item.name for item in task])} (accuracy after training)"
        frame(axes, across, f"kept: {listing([item.name for item in knowledge])} (% of the base)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return finish(figure)
