"""The figure of the trade-off between what was learned and what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from keeptune.core.intervals import Estimate, combine
from keeptune.report.placing import Label, place, point_box
from keeptune.report.records import Report, ReportLike, as_report
from keeptune.report.style import (
    INK,
    MANY,
    MUTED,
    Look,
    bare,
    ends,
    finish,
    looks,
    page,
    themed,
)
from keeptune.report.summary import Series, kept, learned, lost, methods
from keeptune.report.verdict import yardstick
from keeptune.report.wording import listing, number

__all__ = ["tradeoff"]


@dataclass(frozen=True)
class _Spot:
    """One method in the trade-off plot."""

    label: str
    x: Estimate
    y: Estimate
    look: Look


def tradeoff(report: ReportLike) -> Figure | None:
    """Plot what was learned against what was kept; up and to the right is better.

    Args:
        report: The report.

    Returns:
        The figure; None when the report has no task or no knowledge benchmark.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    knowledge, task = yardstick(parsed, "knowledge"), yardstick(parsed, "task")
    spots = _spots(parsed, knowledge, task)
    start = _before(parsed, task)
    if not spots or start is None:
        return None
    with themed():
        figure = page(7.0, min(4.6 + 0.15 * max(len(spots) - MANY, 0), 6.4))
        axes = figure.subplots()
        even = 0.0 if knowledge[0].lower_is_better else 100.0
        near = _limit(axes, spots, start, even, knowledge[0], task[0])
        _frame_tradeoff(axes, knowledge, task)
        axes.axhline(even, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for spot in spots:
            _draw_spot(axes, spot, 1.0 if len(spots) <= MANY else 0.55)
        finish(figure)
        taken = _taken(axes, spots, even)
        taken += _mark_base(axes, start, even, near, task[0])
        labels = [Label(spot.x.mean, spot.y.mean, spot.label, spot.look.text) for spot in spots]
        place(axes, labels, taken)
    return figure


def _spots(report: Report, knowledge: Sequence[Series], task: Sequence[Series]) -> list[_Spot]:
    """Work out where the methods lie.

    Args:
        report: The report.
        knowledge: The knowledge benchmarks of one unit.
        task: The task benchmarks of one unit.

    Returns:
        The methods that have both numbers.
    """
    if not knowledge or not task:
        return []
    colours = looks(report)
    found = []
    for method in methods(report):
        x = learned(method, task)
        y = lost(method, knowledge) if knowledge[0].lower_is_better else kept(method, knowledge)
        if x is not None and y is not None:
            if not task[0].lower_is_better:
                x = Estimate(x.mean, max(x.low, 0.0), min(x.high, 1.0), x.values) if x.has_interval else x
            found.append(_Spot(method.label, x, y, colours[method.label]))
    return found


def _before(report: Report, task: Sequence[Series]) -> float | None:
    """Average the task score of the base model.

    Args:
        report: The report.
        task: The task benchmarks.

    Returns:
        The score, None when nothing was measured.
    """
    names = {item.name for item in task}
    scores = [item.before for run in report.runs for item in run.benchmarks if item.name in names]
    found = combine([(score, score, score) for score in scores])
    return None if found is None else found.mean


def _limit(axes: Axes, spots: Sequence[_Spot], start: float, even: float, knowledge: Series, task: Series) -> bool:
    """Set the limits so that everything fits, better values up and to the right.

    Args:
        axes: The plot.
        spots: The methods.
        start: The task score of the base.
        even: Where nothing is forgotten.
        knowledge: A knowledge benchmark.
        task: A task benchmark.

    Returns:
        True when the base lies near enough to be shown at its place.
    """
    xs = [value for spot in spots for value in (spot.x.mean, spot.x.low, spot.x.high, *spot.x.values)]
    ys = [value for spot in spots for value in (spot.y.mean, spot.y.low, spot.y.high, *spot.y.values)]
    left, right = ends(xs, 0.02 if not task.lower_is_better else 0.05)
    span = right - left
    near = left - 1.5 * span <= start <= right + 1.5 * span
    if near:
        left, right = min(left, start), max(right, start)
        span = right - left
    low, high = ends([*ys, even], 1.0 if not knowledge.lower_is_better else 0.02)
    axes.set_xlim(left - 0.12 * span, right + 0.14 * span)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    if task.lower_is_better:
        axes.invert_xaxis()
    if knowledge.lower_is_better:
        axes.invert_yaxis()
    return near


def _frame_tradeoff(axes: Axes, knowledge: Sequence[Series], task: Sequence[Series]) -> None:
    """Write the axis labels and draw the grid of the trade-off plot.

    Args:
        axes: The plot.
        knowledge: The knowledge benchmarks of one unit.
        task: The task benchmarks of one unit.
    """
    names = _names(knowledge, "knowledge")
    scores = "loss, nats/token" if task[0].lower_is_better else "accuracy"
    skill = _names(task, "task")
    axes.set_xlabel(f"learned: {skill} ({scores} after training)")
    if knowledge[0].lower_is_better:
        axes.set_ylabel(f"forgotten: {names} (nats/token)")
    else:
        axes.set_ylabel(f"kept: {names} (% of the base)")
    axes.grid(visible=True)
    bare(axes, ("left", "bottom"))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.text(1.0, 1.015, "better ↗", ha="right", va="bottom", fontsize=9, color=MUTED, transform=axes.transAxes)


def _names(chosen: Sequence[Series], role: str) -> str:
    """Name the benchmarks on an axis, or count them when there are many.

    Args:
        chosen: The benchmarks.
        role: Their role.

    Returns:
        The words.
    """
    few = listing([item.name for item in chosen])
    return few if len(chosen) == 1 or len(few) <= 24 else f"mean of {len(chosen)} {role} benchmarks"


def _draw_spot(axes: Axes, spot: _Spot, strength: float) -> None:
    """Draw a method: seeds small, the mean large, intervals as thin bars.

    Args:
        axes: The plot.
        spot: The method.
        strength: How strong seeds and bars are, 1 where there are few methods.
    """
    look = spot.look
    bar: dict[str, Any] = {"color": look.colour, "lw": 1.1 * strength, "alpha": 0.6 * strength, "zorder": 2}
    if spot.x.has_interval:
        axes.plot([spot.x.low, spot.x.high], [spot.y.mean] * 2, **bar)
    if spot.y.has_interval:
        axes.plot([spot.x.mean] * 2, [spot.y.low, spot.y.high], **bar)
    if len(spot.x.values) == len(spot.y.values) > 1:
        xs, ys = spot.x.values, spot.y.values
        axes.scatter(
            xs, ys, marker=look.shape, s=16 * strength, c=look.colour, alpha=0.55 * strength, linewidths=0, zorder=3
        )
    axes.scatter(
        [spot.x.mean],
        [spot.y.mean],
        marker=look.shape,
        s=78,
        c=look.colour,
        edgecolors="white",
        linewidths=1.2,
        zorder=4,
    )


def _taken(axes: Axes, spots: Sequence[_Spot], even: float) -> list[Bbox]:
    """Collect the places that labels should leave free.

    Args:
        axes: The plot.
        spots: The methods.
        even: Where nothing is forgotten.

    Returns:
        Boxes in pixels around markers, bars and the line.
    """
    boxes = []
    frame = axes.get_window_extent()
    level = axes.transData.transform((0, even))[1]
    boxes.append(Bbox.from_extents(frame.x0, level - 2, frame.x1, level + 2))
    for spot in spots:
        boxes.append(point_box(axes, spot.x.mean, spot.y.mean, 9))
        for x, y in zip(spot.x.values, spot.y.values, strict=False):
            boxes.append(point_box(axes, x, y, 4))
        ends = axes.transData.transform(
            [
                (spot.x.low if spot.x.has_interval else spot.x.mean, spot.y.mean),
                (spot.x.high if spot.x.has_interval else spot.x.mean, spot.y.mean),
                (spot.x.mean, spot.y.low if spot.y.has_interval else spot.y.mean),
                (spot.x.mean, spot.y.high if spot.y.has_interval else spot.y.mean),
            ]
        )
        for one, two in ((ends[0], ends[1]), (ends[2], ends[3])):
            low, high = one.clip(max=two), two.clip(min=one)
            boxes.append(Bbox.from_extents(low[0] - 1, low[1] - 1, high[0] + 1, high[1] + 1))
    return boxes


def _mark_base(axes: Axes, start: float, even: float, near: bool, task: Series) -> list[Bbox]:
    """Mark the base model by a star, or by a note at the edge when it lies far away.

    Args:
        axes: The plot.
        start: The task score of the base.
        even: Where nothing is forgotten.
        near: Whether the star fits.
        task: A task benchmark.

    Returns:
        The boxes taken.
    """
    if near:
        axes.scatter([start], [even], marker="*", s=150, c=INK, edgecolors="white", linewidths=0.8, zorder=5)
        right = axes.transAxes.inverted().transform(axes.transData.transform((start, even)))[0] > 0.8
        offset, side = ((-11, 9), "right") if right else ((9, 9), "left")
        text = axes.annotate(
            "base model", (start, even), offset, textcoords="offset points", ha=side, color=INK, fontsize=9
        )
    else:
        behind = (start < axes.get_xlim()[0]) != task.lower_is_better
        words = f"← base model at {number(start)}" if behind else f"base model at {number(start)} →"
        text = axes.annotate(
            words,
            (0.0 if behind else 1.0, even),
            (4 if behind else -4, 8),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="left" if behind else "right",
            color=INK,
            fontsize=9,
        )
    boxes = [text.get_window_extent()]
    return [*boxes, point_box(axes, start, even, 10)] if near else boxes
