"""What every knowledge benchmark lost, a line for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keeptune.report.estimates import Method, Series, forgetting, methods, series
from keeptune.report.figures import drawing
from keeptune.report.numbers import number, points
from keeptune.report.records import ReportLike, as_report

__all__ = ["forgetting_by_benchmark"]


def forgetting_by_benchmark(report: ReportLike) -> Figure | None:
    """Returns a panel for each knowledge benchmark with what each method lost, and 95% intervals.

    Args:
        report: The report.

    Returns:
        The figure; None without knowledge benchmarks.
    """
    parsed = as_report(report)
    known = methods(parsed)
    shown = [kind for kind in series(parsed, "knowledge") if any(forgetting(m, kind.name) is not None for m in known)]
    if not shown:
        return None
    wide = 2 if len(shown) in (2, 4) else min(len(shown), 3)
    deep = math.ceil(len(shown) / wide)
    with drawing.themed():
        figure = drawing.page(7.0 if wide > 1 else 6.0, (0.3 * len(known) + 0.95) * deep + 0.1)
        panels = figure.subplots(deep, wide, sharey=True, squeeze=False).flat
        for panel, kind in zip(panels, shown, strict=False):
            _panel(panel, known, kind, 3 if wide > 2 else 5)
        for panel in list(panels)[len(shown) :]:
            panel.set_visible(False)
        return drawing.finish(figure)


def _panel(axes: Axes, known: Sequence[Method], kind: Series, ticks: int) -> None:
    spans = [0.0]
    for index, method in enumerate(known):
        loss = forgetting(method, kind.name)
        if loss is None:
            continue
        drawn = drawing.look(index)
        axes.plot([loss.low, loss.high], [index, index], color=drawn.colour, lw=2, alpha=0.55, zorder=2)
        axes.plot([loss.mean], [index], drawn.shape, ms=7.5, color=drawn.colour, mec="white", mew=0.9, zorder=3)
        text = number(loss.mean) if kind.lower_is_better else points(loss.mean)
        style: dict[str, Any] = {"ha": "center", "va": "bottom", "color": drawing.INK, "fontsize": 8.5}
        axes.annotate(text, (loss.mean, index), (0, 5.5), textcoords="offset points", **style)
        spans += [value for value in (loss.mean, loss.low, loss.high) if math.isfinite(value)]
    axes.axvline(0, color=drawing.MUTED, lw=1, zorder=1)
    pad = max(0.07 * (max(spans) - min(spans)), 0.01 if kind.lower_is_better else 1.0)
    axes.set_xlim(min(spans) - pad, max(spans) + pad)
    axes.set_ylim(len(known) - 0.45, -0.75)
    axes.set_yticks(range(len(known)), [method.label for method in known])
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    drawing.bare(axes)
    axes.set_title(kind.name)
    axes.set_xlabel("lost, nats/token" if kind.lower_is_better else "lost, points")
