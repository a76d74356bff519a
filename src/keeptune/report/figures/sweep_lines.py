"""K, T and KT along the points of a sweep or of a repair's μ, and the scores behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from keeptune.core.intervals import Estimate, combine, lower_is_better, mean_of_seeds
from keeptune.report.figures.drawing import (
    INK,
    bars,
    caption,
    finish,
    frame,
    legend,
    line,
    look,
    page,
    themed,
    wrapped,
)

__all__ = ["repair_figure", "sweep_figure"]

_FULL: Final = "full"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Line:
    """One quantity along the points, and its value before training."""

    label: str
    points: Mapping[str, Estimate]
    before: float | None = None


@dataclass(frozen=True)
class _Scale:
    """Where the points stand; points without a place (full fine-tuning) are levels across the plot."""

    places: Mapping[str, float]
    levels: Sequence[str]
    numeric: bool
    log: bool
    label: str


def sweep_figure(sweep: Mapping[str, Any]) -> Figure | None:
    """Returns K, T and KT against the points of a sweep, with the scores of each benchmark below.

    The axis is numeric where every point but full fine-tuning and the baseline has an ``x``; these are then dashed
    levels. Marks are means over seeds, small dots the seeds, bars 95% intervals (:mod:`keeptune.core.intervals`).

    Args:
        sweep: As in ``runs.json``: ``rows`` (``name``, ``x``, ``seed``, ``method``, ``K``, ``T``, ``KT``,
            ``benchmarks``) and ``axis``, perhaps ``baseline``; a ``caption`` replaces the usual one.

    Returns:
        The figure; None when there is no number to draw.
    """
    rows: Rows = sweep["rows"]
    panels = [
        ("kept (K), learned (T) and both (KT)", [_score(rows, name) for name in ("K", "T", "KT")]),
        ("accuracy after training", _benchmarks(rows, nats=False)),
        ("cross entropy after training, nats/token", _benchmarks(rows, nats=True)),
    ]
    drawn = [(title, lines) for title, every in panels if (lines := [line for line in every if line.points])]
    if not drawn:
        return None
    scale = _scale(sweep)
    with themed():
        figure = page(7.0, 2.45 * len(drawn) + 0.75)
        grid = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)
        for axes, (title, lines) in zip(grid.flat, drawn, strict=True):
            _panel(axes, lines, scale)
            axes.set_title(title)
        _ticks(grid.flat[-1], scale)
        seeds = "marks: means over seeds; dots: seeds; " if len({row["seed"] for row in rows}) > 1 else ""
        caption(figure, sweep.get("caption") or f"{seeds}bars: 95% intervals; dotted: the base model")
        return finish(figure)


def repair_figure(record: Mapping[str, Any]) -> Figure | None:
    """Returns the scores at each μ of a repair's sweep.

    Args:
        record: As in ``repair.json``.

    Returns:
        The figure; None without a sweep or without scores.
    """
    if "sweep" not in record or "scores" not in record:
        return None
    rows = [_repaired(record["scores"], f"mu {entry['mu']:g}", entry["mu"]) for entry in record["sweep"]]
    adapter = _repaired(record["scores"], "adapter", None)
    rows = [*rows, adapter] if rows and all(row["x"] > 0 for row in rows) else rows
    words = "bars: 95% intervals; dotted: the base model; dashed: the adapter as it was"
    return sweep_figure({"rows": rows, "axis": "mu", "baseline": "adapter", "caption": words})


def _repaired(scores: Rows, label: str, x: float | None) -> dict[str, Any]:
    benchmarks = []
    for row in scores:
        own = next(entry for entry in row["models"] if entry["label"] == label)
        item = {"before": row["base"], "after": own["score"], "interval": own["interval"]}
        benchmarks.append({key: row[key] for key in ("name", "role", "metric")} | item)
    point = {"name": label, "x": x, "seed": 0, "method": "repair", "benchmarks": benchmarks}
    return point | {"K": None, "T": None, "KT": None}


def _score(rows: Rows, key: str) -> _Line:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row[key] is not None:
            values.setdefault(row["name"], []).append(float(row[key]))
    return _Line(key, {name: mean for name, own in values.items() if (mean := mean_of_seeds(own)) is not None})


def _benchmarks(rows: Rows, *, nats: bool) -> list[_Line]:
    kinds = {item["name"]: item for row in reversed(rows) for item in reversed(row["benchmarks"])}
    lines = []
    for name in dict.fromkeys(item["name"] for row in rows for item in row["benchmarks"]):
        kind = kinds[name]
        if lower_is_better(kind["metric"]) != nats:
            continue
        triples: dict[str, list[tuple[float, float, float]]] = {}
        for row in rows:
            for item in row["benchmarks"]:
                if item["name"] == name:
                    low, high = (math.nan if end is None else item["before"] + end for end in item["interval"])
                    triples.setdefault(row["name"], []).append((float(item["after"]), low, high))
        points = {point: mean for point, own in triples.items() if (mean := combine(own)) is not None}
        word = "keep" if kind["role"] == "knowledge" else "learn"
        lines.append(_Line(f"{name} ({word})", points, float(kind["before"])))
    return lines


def _scale(sweep: Mapping[str, Any]) -> _Scale:
    first = {row["name"]: row for row in reversed(sweep["rows"])}
    names = list(dict.fromkeys(row["name"] for row in sweep["rows"]))
    placed = [name for name in names if first[name]["x"] is not None]
    others = [name for name in names if first[name]["x"] is None]
    compared = sweep.get("baseline")
    if not placed or any(first[name]["method"] != _FULL and name != compared for name in others):
        return _Scale({name: float(index) for index, name in enumerate(names)}, [], False, False, "")
    places = {name: float(first[name]["x"]) for name in sorted(placed, key=lambda name: float(first[name]["x"]))}
    low, high = min(places.values()), max(places.values())
    return _Scale(places, others, True, low > 0 and high >= 16 * low, str(sweep.get("axis") or "x"))


def _panel(axes: Axes, lines: Sequence[_Line], scale: _Scale) -> None:
    if scale.log:
        axes.set_xscale("log")
    for index, own in enumerate(lines):
        drawn = look(index)
        shown = [(x, own.points[name]) for name, x in scale.places.items() if name in own.points]
        # Categories have no order, so nothing lies between them.
        line(axes, [(x, point.mean) for x, point in shown], drawn, own.label, ms=7, ls="-" if scale.numeric else "none")
        bars(axes, [(x, point.low, point.high) for x, point in shown], drawn.colour)
        for x, point in shown:
            style: dict[str, Any] = {"s": 11, "color": drawn.colour, "alpha": 0.6, "linewidths": 0, "zorder": 3}
            axes.scatter([x] * len(point.values), point.values, **style)
        for name in scale.levels:
            if name in own.points:
                axes.axhline(own.points[name].mean, color=drawn.colour, lw=1.1, ls=(0, (5, 3)), zorder=1)
        if own.before is not None:
            axes.axhline(own.before, color=drawn.colour, lw=1, ls=":", zorder=1)
    frame(axes, ticks=5)
    axes.margins(x=0.06, y=0.12)
    legend(axes, handlelength=1.6)


def _ticks(axes: Axes, scale: _Scale) -> None:
    places, names = list(scale.places.values()), list(scale.places)
    slanted = not scale.numeric and len(names) > 6
    texts = [f"{x:g}" for x in places] if scale.numeric else names if slanted else [wrapped(name, 13) for name in names]
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter(texts))
    axes.xaxis.set_minor_locator(NullLocator())
    if slanted:
        axes.tick_params(axis="x", labelrotation=35)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    if scale.label:
        dashed = f"   (dashed: {', '.join(scale.levels)})" if scale.levels else ""
        axes.set_xlabel(f"{scale.label}{dashed}", color=INK)
