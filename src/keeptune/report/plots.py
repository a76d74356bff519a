"""Figures of a comparison: the trade-off, what each benchmark lost, and the loss curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keeptune.report.drift import penalty_figure
from keeptune.report.layers import importance_map, rank_map, uniform_rank
from keeptune.report.maps import forgetting_by_relation
from keeptune.report.placing import spread
from keeptune.report.records import Report, ReportLike, as_report
from keeptune.report.spectra import evidence_names, kept_spectra, spectra
from keeptune.report.style import (
    MANY,
    MUTED,
    RULE,
    Look,
    bare,
    ends,
    finish,
    looks,
    page,
    png,
    svg,
    themed,
)
from keeptune.report.summary import Method, Series, forgetting, methods, series
from keeptune.report.tradeoff import tradeoff
from keeptune.report.wording import number, points

__all__ = [
    "evidence_names",
    "forgetting_by_benchmark",
    "forgetting_by_relation",
    "importance_map",
    "kept_spectra",
    "loss_curves",
    "penalty_figure",
    "png",
    "rank_map",
    "smooth_mean",
    "spectra",
    "svg",
    "thin",
    "tradeoff",
    "uniform_rank",
]


def forgetting_by_benchmark(report: ReportLike) -> Figure | None:
    """Plot what every knowledge benchmark lost, with 95% intervals.

    Args:
        report: The report.

    Returns:
        One panel for each benchmark, one row for each method; None without knowledge benchmarks.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    shown = [item for item in series(parsed, "knowledge") if _measured(parsed, item)]
    found = methods(parsed)
    if not shown:
        return None
    wide = 2 if len(shown) in (2, 4) else min(len(shown), 3)
    deep = math.ceil(len(shown) / wide)
    with themed():
        row = 0.3 * len(found) + 0.95
        figure = page(7.0 if wide > 1 else 6.0, row * deep + 0.1)
        grid = figure.subplots(deep, wide, sharey=True, squeeze=False)
        for index, panel in enumerate(grid.flat):
            if index < len(shown):
                _dots(panel, parsed, found, shown[index], 3 if wide > 2 else 5)
            else:
                panel.set_visible(False)
        return finish(figure)


def _measured(report: Report, kind: Series) -> bool:
    """Tell whether any method has a number on a benchmark.

    Args:
        report: The report.
        kind: The benchmark.

    Returns:
        True when one has.
    """
    return any(forgetting(method, kind.name) is not None for method in methods(report))


def _dots(axes: Axes, report: Report, found: Sequence[Method], kind: Series, ticks: int) -> None:
    """Draw one panel of the forgetting plot.

    Args:
        axes: The panel.
        report: The report.
        found: The methods.
        kind: The benchmark.
        ticks: At most how many intervals between ticks.
    """
    colours = looks(report)
    spans = [0.0]
    for index, method in enumerate(found):
        loss = forgetting(method, kind.name)
        if loss is None:
            continue
        look = colours[method.label]
        if loss.has_interval:
            axes.plot([loss.low, loss.high], [index, index], color=look.colour, lw=2, alpha=0.55, zorder=2)
        fill, shape = look.colour, look.shape
        axes.scatter([loss.mean], [index], marker=shape, s=48, c=fill, edgecolors="white", linewidths=0.9, zorder=3)
        text = number(loss.mean) if kind.lower_is_better else points(loss.mean)
        axes.annotate(
            text,
            (loss.mean, index),
            (0, 5.5),
            textcoords="offset points",
            ha="center",
            color=look.text,
            fontsize=8.5,
            va="bottom",
        )
        spans += [value for value in (loss.mean, loss.low, loss.high) if math.isfinite(value)]
    axes.axvline(0, color=MUTED, lw=1, zorder=1)
    low, high = ends(spans, 0.02 if kind.lower_is_better else 2.0)
    axes.set_xlim(low - 0.07 * (high - low), high + 0.07 * (high - low))
    axes.set_ylim(len(found) - 0.45, -0.75)
    axes.set_yticks(range(len(found)), [method.label for method in found])
    # Only the first panel of a row has labels.
    for tick, method in zip(axes.get_yticklabels(), found, strict=False):
        tick.set_color(colours[method.label].text)
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    bare(axes)
    axes.set_title(kind.name)
    axes.set_xlabel("lost, nats/token" if kind.lower_is_better else "lost, points")


def loss_curves(report: ReportLike) -> Figure | None:
    """Plot the training loss of every method, smoothed, with the raw values behind.

    Args:
        report: The report.

    Returns:
        The figure; None when no run has two or more losses.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    curves = [(method, smooth_mean(method)) for method in methods(parsed)]
    drawn = [(method, curve) for method, curve in curves if len(curve) > 1]
    if not drawn:
        return None
    colours = looks(parsed)
    with themed():
        figure = page(7.0, max(3.6, 0.22 * len(drawn) + 1.2))
        axes = figure.subplots()
        few = len(drawn) <= MANY
        for method, curve in drawn:
            colour = colours[method.label].colour
            for run in method.runs if few else ():
                axes.plot(*thin(run.loss), color=colour, lw=0.6, alpha=0.22, zorder=2)
            axes.plot(*thin(curve), color=colour, lw=1.8 if few else 1.2, zorder=3)
        raw = sorted(loss for method, _ in drawn for run in method.runs for _, loss in run.loss)
        low, high = ends([raw[0], raw[min(len(raw) - 1, int(0.995 * len(raw)))]], 0.01)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_xlabel("training step")
        axes.set_ylabel("training loss (nats/token)")
        axes.grid(visible=True)
        bare(axes, ("left", "bottom"))
        axes.spines["left"].set_color(RULE)
        axes.margins(x=0.01)
        _end_labels(figure, axes, [(method.label, curve[-1]) for method, curve in drawn], colours)
        return finish(figure)


def _end_labels(
    figure: Figure, axes: Axes, tips: Sequence[tuple[str, tuple[float, float]]], colours: dict[str, Look]
) -> None:
    """Write the methods at the ends of their curves, moved apart where needed.

    Args:
        figure: The figure.
        axes: The plot.
        tips: Label and last point of each curve.
        colours: The looks.
    """
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / figure.dpi
    gap = 12.5 * (high - low) / height
    left, edge = axes.get_xlim()
    moved = spread([point[1] for _, point in tips], gap)
    shift = max(0.0, low - min(moved))
    far = any(abs(y + shift - point[1]) > gap for (_, point), y in zip(tips, moved, strict=True))
    tail = edge + 0.05 * (edge - left) if far else edge
    for (label, point), y in zip(tips, moved, strict=True):
        line = {"arrowstyle": "-", "color": colours[label].text, "lw": 0.6, "relpos": (0.0, 0.5), "patchA": None}
        axes.annotate(
            label,
            point,
            (tail, y + shift),
            textcoords="data",
            annotation_clip=False,
            arrowprops=line if far else None,
            ha="left",
            va="center",
            color=colours[label].text,
            fontsize=9,
            fontweight="bold",
        )


def smooth_mean(method: Method) -> list[tuple[float, float]]:
    """Average the seeds at each step and smooth the result over about a twentieth of its length.

    Args:
        method: The method.

    Returns:
        Pairs of step and loss.
    """
    by_step: dict[float, list[float]] = {}
    for run in method.runs:
        for step, loss in run.loss:
            by_step.setdefault(step, []).append(loss)
    steps = sorted(by_step)
    means = [math.fsum(by_step[step]) / len(by_step[step]) for step in steps]
    reach = min(len(means) // 40 + 1, 25) if len(means) > 8 else 0
    smooth = []
    for index in range(len(means)):
        # A lopsided window would bend the steep start; the flat end can bear one.
        window = means[index - min(reach, index) : index + min(reach, index) + 1]
        smooth.append((steps[index], math.fsum(window) / len(window)))
    return smooth


def thin(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Keep at most about 400 points of a curve, the last one among them.

    Args:
        curve: Pairs of step and loss.

    Returns:
        The steps and the losses.
    """
    stride = max(len(curve) // 400, 1)
    kept_points = [*curve[:-1:stride], *curve[-1:]]
    return [step for step, _ in kept_points], [loss for _, loss in kept_points]
