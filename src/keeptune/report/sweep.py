"""The figure of a sweep: K, T and KT along its points, and the scores behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from keeptune.report.heat import wrapped
from keeptune.report.style import INK, MUTED, RULE, bare, finish, page, themed

__all__ = ["sweep_figure"]

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b07c00", "#3a87b8", "#7a7a7a")
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X")
_FULL: Final = "full"


@dataclass(frozen=True)
class _Line:
    """One quantity along the points: the values of the seeds at each, and an interval where there is one seed."""

    label: str
    values: Mapping[str, Sequence[float]]
    interval: Mapping[str, tuple[float, float]]
    before: float | None = None


@dataclass(frozen=True)
class _Axis:
    """Where the points stand; points without a place (full fine-tuning) are levels across the plot."""

    places: Mapping[str, float]
    levels: Sequence[str]
    numeric: bool
    log: bool
    label: str


def sweep_figure(sweep: Mapping[str, Any]) -> Figure | None:
    """Plot K, T and KT against the points of a sweep, with the scores of each benchmark below.

    The axis is numeric where every point but full fine-tuning and the baseline has an ``x``; these are then dashed
    levels. Marks are means over seeds, small dots the seeds, bars their range; with one seed, bars of scores are
    95% intervals over the items.

    Args:
        sweep: As in ``sweep.json``: ``rows`` (``name``, ``x``, ``seed``, ``method``, ``K``, ``T``, ``KT``,
            ``benchmarks``) and ``axis``, perhaps ``baseline``; a ``caption`` replaces the usual one.

    Returns:
        The figure; None when there is no number to draw.
    """
    rows: Sequence[Mapping[str, Any]] = sweep["rows"]
    scores = [_line(rows, key) for key in ("K", "T", "KT")]
    panels = [
        ("kept (K), learned (T) and both (KT)", scores),
        ("accuracy after training", _benchmarks(rows, lower_is_better=False)),
        ("cross entropy after training, nats/token", _benchmarks(rows, lower_is_better=True)),
    ]
    drawn = [(title, [line for line in lines if line.values]) for title, lines in panels]
    drawn = [(title, lines) for title, lines in drawn if lines]
    if not drawn:
        return None
    axis = _axis(sweep)
    with themed():
        figure = page(7.0, 2.45 * len(drawn) + 0.75)
        grid = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)
        for panel, (title, lines) in zip(grid.flat, drawn, strict=True):
            _panel(panel, lines, axis)
            panel.set_title(title)
        _ticks(grid.flat[-1], axis)
        several = len({row["seed"] for row in rows}) > 1
        words = "marks: means over seeds; dots: seeds; bars: their range" if several else "bars: 95% intervals"
        caption = sweep.get("caption") or f"{words}; dotted: the base model"
        figure.supxlabel(caption, fontsize=8.5, color=MUTED, x=0.99, ha="right")
        return finish(figure)


def _line(rows: Sequence[Mapping[str, Any]], key: str) -> _Line:
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row[key]
        if value is not None and math.isfinite(value):
            values.setdefault(row["name"], []).append(float(value))
    return _Line(key, values, {})


def _benchmarks(rows: Sequence[Mapping[str, Any]], *, lower_is_better: bool) -> list[_Line]:
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        for item in row["benchmarks"]:
            if (item["metric"] == "cross_entropy") == lower_is_better:
                found.setdefault(item["name"], item)
    lines = []
    for name, first in found.items():
        items = {(row["name"], row["seed"]): item for row in rows for item in row["benchmarks"] if item["name"] == name}
        values: dict[str, list[float]] = {}
        for (point, _), item in items.items():
            values.setdefault(point, []).append(float(item["after"]))
        ends = {
            point: (item["before"] + item["interval"][0], item["before"] + item["interval"][1])
            for (point, _), item in items.items()
            if len(values[point]) == 1
        }
        word = "keep" if first["role"] == "knowledge" else "learn"
        lines.append(_Line(f"{name} ({word})", values, ends, float(first["before"])))
    return lines


def _axis(sweep: Mapping[str, Any]) -> _Axis:
    first = {row["name"]: row for row in reversed(sweep["rows"])}
    names = list(dict.fromkeys(row["name"] for row in sweep["rows"]))
    placed = [name for name in names if first[name]["x"] is not None]
    others = [name for name in names if first[name]["x"] is None]
    compared = sweep.get("baseline")
    if not placed or any(first[name]["method"] != _FULL and name != compared for name in others):
        return _Axis({name: float(index) for index, name in enumerate(names)}, [], False, False, "")
    places = {name: float(first[name]["x"]) for name in sorted(placed, key=lambda name: float(first[name]["x"]))}
    low, high = min(places.values()), max(places.values())
    return _Axis(places, others, True, low > 0 and high >= 16 * low, str(sweep.get("axis") or "x"))


def _panel(axes: Axes, lines: Sequence[_Line], axis: _Axis) -> None:
    if axis.log:
        axes.set_xscale("log")
    for index, line in enumerate(lines):
        colour, shape = _COLOURS[index % len(_COLOURS)], _SHAPES[index % len(_SHAPES)]
        names = [name for name in axis.places if name in line.values]
        xs = [axis.places[name] for name in names]
        means = [math.fsum(line.values[name]) / len(line.values[name]) for name in names]
        # Categories have no order, so nothing lies between them.
        style = "-" if axis.numeric else "none"
        axes.plot(
            xs, means, color=colour, marker=shape, ms=7, mec="white", lw=1.6, ls=style, zorder=4, label=line.label
        )
        for x, name in zip(xs, names, strict=True):
            seeds = line.values[name]
            low, high = line.interval.get(name, (min(seeds), max(seeds)))
            axes.plot([x, x], [low, high], color=colour, lw=1.3, alpha=0.6, zorder=2)
            axes.scatter([x] * len(seeds), seeds, s=11, c=colour, alpha=0.6, linewidths=0, zorder=3)
        for name in axis.levels:
            if name in line.values:
                level = math.fsum(line.values[name]) / len(line.values[name])
                axes.axhline(level, color=colour, lw=1.1, ls=(0, (5, 3)), zorder=1)
        if line.before is not None:
            axes.axhline(line.before, color=colour, lw=1, ls=":", zorder=1)
    axes.grid(visible=True)
    bare(axes, ("left", "bottom"))
    axes.spines["left"].set_color(RULE)
    axes.margins(x=0.06, y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=9,
        labelcolor="linecolor",
        handlelength=1.6,
    )


def _ticks(axes: Axes, axis: _Axis) -> None:
    places = list(axis.places.values())
    names = list(axis.places)
    slanted = not axis.numeric and len(names) > 6
    texts = [f"{x:g}" for x in places] if axis.numeric else names if slanted else [wrapped(name, 13) for name in names]
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter(texts))
    axes.xaxis.set_minor_locator(NullLocator())
    if slanted:
        axes.tick_params(axis="x", labelrotation=35)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    if axis.label:
        dashed = f"   (dashed: {', '.join(axis.levels)})" if axis.levels else ""
        axes.set_xlabel(f"{axis.label}{dashed}", color=INK)
