"""What penalties did while training: their value, and how far each layer is from where it started."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keeptune.report.heat import short
from keeptune.report.records import Report, ReportLike, Run, as_report
from keeptune.report.style import INK, MANY, bare, finish, page, themed
from keeptune.report.summary import methods

__all__ = ["penalty_figure"]

_DEPTH = "viridis_r"  # deep layers are dark


def penalty_figure(report: ReportLike) -> Figure | None:
    """Plot task loss and penalty, and the drift of each layer, over the steps of each method with penalties.

    Args:
        report: The report.

    Returns:
        A row of two panels for each of at most eight methods, with its first seed; None without penalties.

    Raises:
        ArtefactError: The report is malformed.
    """
    shown = _penalised(as_report(report))[:MANY]
    if not shown:
        return None
    layers = sorted({layer for _, run in shown for row in run.drift for layer in row.layers})
    with themed():
        figure = page(9.0, 2.5 * len(shown) + 0.5)
        panels = figure.subplots(len(shown), 2, squeeze=False)
        depth = Normalize(layers[0] if layers else 0, max([*layers, 1]))
        for row, (label, run) in enumerate(shown):
            _losses(panels[row][0], run)
            _drifts(panels[row][1], run, depth)
            panels[row][0].set_title(f"{short(label, 40)}: loss and penalty")
            panels[row][1].set_title("drift of each layer, ‖ΔW‖ / ‖W‖")
            for axes in panels[row]:
                axes.grid(visible=True)
                axes.set_ylim(bottom=0)
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
                bare(axes, ("left", "bottom"))
        for axes in panels[-1]:
            axes.set_xlabel("training step")
        if layers:
            colours = ScalarMappable(depth, matplotlib.colormaps[_DEPTH])
            bar = figure.colorbar(colours, ax=list(panels[:, 1]), ticks=MaxNLocator(6, integer=True), aspect=30)
            bar.set_label("layer")
            bar.outline.set_visible(False)
        return finish(figure)


def _penalised(report: Report) -> list[tuple[str, Run]]:
    return [(method.label, method.runs[0]) for method in methods(report) if len(method.runs[0].drift) > 1]


def _losses(axes: Axes, run: Run) -> None:
    steps = [row.step for row in run.drift]
    lines: Sequence[tuple[str, Mapping[float, float], str]] = (
        ("task loss", dict(run.loss), INK),
        ("penalty", {row.step: row.penalty for row in run.drift}, "#d55e00"),
    )
    for name, values, ink in lines:
        axes.plot(steps, [values.get(step, math.nan) for step in steps], color=ink, lw=1.6, label=name)
    # The loss falls from far above what a penalty costs: the start is cut off.
    late = [values[step] for _, values, _ in lines for step in steps[len(steps) // 5 :] if step in values]
    axes.set_ylim(0, 1.1 * max([value for value in late if math.isfinite(value)], default=1.0))
    axes.set_ylabel("nats")
    axes.legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="upper right")


def _drifts(axes: Axes, run: Run, depth: Normalize) -> None:
    for layer in sorted({layer for row in run.drift for layer in row.layers}):
        points = [(row.step, row.layers[layer]) for row in run.drift if layer in row.layers]
        colour = matplotlib.colormaps[_DEPTH](float(depth(layer)))
        axes.plot([step for step, _ in points], [drift for _, drift in points], color=colour, lw=1.4)
