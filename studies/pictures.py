"""Pictures of a report for docs: what was learned against what was kept, and what each relation lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from keeptune.report.estimates import kept, learned, methods, relation_losses, series, yardstick
from keeptune.report.figures.drawing import MUTED, colours_of, finish, frame, heat_map, look, page, themed
from keeptune.report.numbers import listing, short
from keeptune.report.records import as_report

__all__ = ["relations", "tradeoff"]


def tradeoff(report: Mapping[str, Any]) -> Figure:
    """Returns what was learned against what was kept, means over seeds with 95% intervals; up and right is better."""
    parsed = as_report(report)
    knowledge, task = yardstick(parsed, "knowledge"), yardstick(parsed, "task")
    with themed():
        figure = page(7.6, 4.8)
        axes = figure.subplots()
        axes.axhline(100, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for index, method in enumerate(methods(parsed)):
            x, y, drawn = learned(method, task), kept(method, knowledge), look(index)
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


def relations(report: Mapping[str, Any], most: int = 25) -> Figure:
    """Returns what was lost on each relation of the first knowledge benchmark with some, the most forgotten first."""
    parsed = as_report(report)
    losses = next(found for kind in series(parsed, "knowledge") if (found := relation_losses(parsed, kind)))
    shown = dict(list(losses.items())[:most])
    table = numpy.array([values for _, values in shown.values()], dtype=float)
    top = float(numpy.nanmax(numpy.abs(table), initial=1e-9))
    labels = [method.label for method in methods(parsed)]
    with themed():
        figure = page(0.95 * len(labels) + 2.6, 0.235 * len(shown) + 1.2)
        axes = figure.subplots()
        heat_map(axes, -table, colours_of("gains"), TwoSlopeNorm(0.0, -top, top), lambda value: f"{-value:.0f}")
        axes.set_yticks(range(len(shown)), [f"{short(name)}  (n={size})" for name, (size, _) in shown.items()])
        axes.set_xticks(range(len(labels)), [short(label, 24) for label in labels], rotation=35, ha="left")
        axes.xaxis.tick_top()
        axes.set_xlabel(f"{len(shown)} most forgotten of {len(losses)} relations; points lost, mean over seeds")
        return finish(figure)
