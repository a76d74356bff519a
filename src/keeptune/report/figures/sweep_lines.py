"""Scores along the points of a sweep, the layers of a study (L2-LoRA Fig. 4) or the μ of a repair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from keeptune.core.intervals import Estimate, combine, lower_is_better, mean_of_seeds
from keeptune.report.figures import drawing
from keeptune.report.numbers import ends, short, unit_words

_FULL: Final = "full"
_TITLES: Final = {
    "single": "tuning one layer at a time",
    "bottom": "tuning the lowest layers",
    "top": "tuning the highest layers",
}
_SUMMARIES: Final = {"K": "kept (K)", "T": "learned (T)", "KT": "both (KT)"}
_WORDS: Final = {"knowledge": "keep", "task": "learn"}
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Line:
    """One quantity along the places of an axis, its levels without a place, and its value before training."""

    label: str
    look: drawing.Look
    points: Mapping[float, Estimate]
    levels: Sequence[float] = ()
    before: float | None = None


@dataclass(frozen=True)
class _Scale:
    """Where the points stand; points without a place (full fine-tuning) are levels across the plot."""

    places: Mapping[str, float]
    levels: Sequence[str]
    numeric: bool
    label: str

    @property
    def log(self) -> bool:
        """Whether the places are positive and far apart."""
        low, high = min(self.places.values()), max(self.places.values())
        return self.numeric and low > 0 and high >= 16 * low


def sweep_figure(sweep: Mapping[str, Any]) -> Figure | None:
    """Returns K, T and KT at the points of a sweep, with the scores of each benchmark below; None without a number.

    The axis is numeric where every point but full fine-tuning and the baseline has an ``x``; these are then dashed
    levels. Marks are means over seeds, small dots the seeds, bars 95% intervals (:mod:`keeptune.core.intervals`).
    ``sweep`` is as in ``runs.json``: ``rows`` and ``axis``, perhaps ``baseline``; a ``caption`` replaces the usual one,
    and ``when`` says what the scores were taken after, where that is not training.
    """
    rows: Rows = sweep["rows"]
    scale, when = _scale(sweep), sweep.get("when", "after training")
    scores = [_line(scale, name, i, _scores(rows, name)) for i, name in enumerate(_SUMMARIES)]
    summaries = [_SUMMARIES[one.label] for one in scores if one.points]
    panels = {
        ", ".join(summaries): scores,
        f"accuracy {when}": _benchmarks(rows, scale, nats=False),
        f"cross entropy {when}, nats/token": _benchmarks(rows, scale, nats=True),
    }
    panels = {title: lines for title, every in panels.items() if (lines := [one for one in every if one.points])}
    if not panels:
        return None
    with drawing.themed():
        figure = drawing.page(7.0, 2.45 * len(panels) + 0.75)
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axes, (title, lines) in zip(grid.flat, panels.items(), strict=True):
            if scale.log:
                axes.set_xscale("log")
            # Categories have no order, so nothing lies between them.
            _panel(axes, lines, ls="-" if scale.numeric else "none")
            axes.set_title(title)
        _ticks(grid.flat[-1], scale)
        seeds = "marks: means over seeds; dots: seeds; " if len({row["seed"] for row in rows}) > 1 else ""
        drawing.caption(figure, sweep.get("caption") or f"{seeds}bars: 95% intervals; dotted: the base model")
        return drawing.finish(figure)


def repair_figure(record: Mapping[str, Any]) -> Figure | None:
    """Returns the scores at each μ of a repair's sweep in ``repair.json``; None without a sweep or without scores."""
    if "sweep" not in record or "scores" not in record:
        return None
    rows = [_repaired(record["scores"], f"mu {entry['mu']:g}", entry["mu"]) for entry in record["sweep"]]
    adapter = _repaired(record["scores"], "adapter", None)
    rows = [*rows, adapter] if rows and all(row["x"] > 0 for row in rows) else rows
    words = "bars: 95% intervals; dotted: the base model; dashed: the adapter as it was"
    return sweep_figure({"rows": rows, "axis": "mu", "baseline": "adapter", "caption": words, "when": "after repair"})


def study_figure(record: Mapping[str, Any]) -> Figure | None:
    """Returns gains and drops by layer, or scores by the number of trainable layers; None when no cell has a place."""
    rows: Rows = record["summary"]
    single = record["study"] == "single"
    units = [unit for unit in ("points", "nats") if any(row["unit"] == unit and row["x"] is not None for row in rows)]
    if not units:
        return None
    places = sorted({row["x"] for row in rows if row["x"] is not None} | (set() if single else {0}))
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    with drawing.themed():
        figure = drawing.page(7.0, 2.9 * len(units) + 0.5)
        for axes, unit in zip(figure.subplots(len(units), 1, sharex=True, squeeze=False).flat, units, strict=True):
            own = [row for row in rows if row["unit"] == unit]
            known = {row["benchmark"] for row in own}
            draw = _effect if single else _course
            _panel(axes, [draw(own, name, drawing.look(i)) for i, name in enumerate(names) if name in known])
            if single:
                axes.axhline(0, color=drawing.RULE, lw=1, zorder=0)
            measures = " or ".join(sorted({row["measure"] for row in own}, reverse=True))
            axes.set_ylabel(
                f"{measures}, {unit_words(unit)}" if single else "score, %" if unit == "points" else "nats/token"
            )
            axes.xaxis.set_major_locator(FixedLocator(places) if len(places) <= 16 else MaxNLocator(12, integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.axes[0].set_title(_TITLES[record["study"]])
        figure.axes[-1].set_xlabel(record["axis"], color=drawing.INK)
        level = "dashed: all of them; " if single and any(row["x"] is None for row in rows) else ""
        seeds = max(len(row["seeds"]) for row in rows)
        over = f"{seeds} seeds and the items" if seeds > 1 else "the items, one seed"
        drawing.caption(figure, f"{level}bars: 95% intervals over {over}")
        return drawing.finish(figure)


def _repaired(scores: Rows, label: str, x: float | None) -> dict[str, Any]:
    benchmarks = []
    for row in scores:
        own = next(entry for entry in row["models"] if entry["label"] == label)
        item = {"before": row["base"], "after": own["score"], "interval": own["interval"]}
        benchmarks.append({key: row[key] for key in ("name", "role", "metric")} | item)
    point = {"name": label, "x": x, "seed": 0, "method": "repair", "benchmarks": benchmarks}
    return point | {"K": None, "T": None, "KT": None}


def _line(
    scale: _Scale, label: str, index: int, means: Mapping[str, Estimate | None], before: float | None = None
) -> _Line:
    known = {name: mean for name, mean in means.items() if mean is not None}
    points = {x: known[name] for name, x in scale.places.items() if name in known}
    levels = [known[name].mean for name in scale.levels if name in known]
    return _Line(label, drawing.look(index), points, levels, before)


def _scores(rows: Rows, key: str) -> dict[str, Estimate | None]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["name"], []).extend([] if row[key] is None else [float(row[key])])
    return {name: mean_of_seeds(own) for name, own in values.items()}


def _benchmarks(rows: Rows, scale: _Scale, *, nats: bool) -> list[_Line]:
    triples: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    kinds: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        for item in row["benchmarks"]:
            if lower_is_better(item["metric"]) == nats:
                kinds.setdefault(item["name"], item)
                tips = item["interval"] or (None, None)
                low, high = (math.nan if end is None else item["before"] + end for end in tips)
                own = triples.setdefault(item["name"], {}).setdefault(row["name"], [])
                own.append((math.nan if item["after"] is None else float(item["after"]), low, high))
    return [
        _line(
            scale,
            f"{name} ({_WORDS[kind['role']]})",
            index,
            {point: combine(own) for point, own in triples[name].items()},
            float(kind["before"]),
        )
        for index, (name, kind) in enumerate(kinds.items())
    ]


def _scale(sweep: Mapping[str, Any]) -> _Scale:
    first = {row["name"]: row for row in reversed(sweep["rows"])}
    names = list(dict.fromkeys(row["name"] for row in sweep["rows"]))
    placed = [name for name in names if first[name]["x"] is not None]
    others = [name for name in names if first[name]["x"] is None]
    compared = sweep.get("baseline")
    if not placed or any(first[name]["method"] != _FULL and name != compared for name in others):
        return _Scale({name: float(index) for index, name in enumerate(names)}, [], False, "")
    places = {name: float(first[name]["x"]) for name in sorted(placed, key=lambda name: float(first[name]["x"]))}
    return _Scale(places, others, True, str(sweep.get("axis") or "x"))


def _panel(axes: Axes, lines: Sequence[_Line], **style: Any) -> None:
    for one in lines:
        colour, points = one.look.colour, one.points
        drawing.line(axes, [(x, point.mean) for x, point in points.items()], one.look, one.label, ms=6.5, **style)
        drawing.bars(axes, [(x, point.low, point.high) for x, point in points.items()], colour)
        for x, point in points.items():
            dots = [(x, value) for value in point.values]
            axes.plot(*zip(*dots, strict=True), "o", ms=3, color=colour, alpha=0.6, mew=0, zorder=3) if dots else None
        for level in one.levels:
            axes.axhline(level, color=colour, lw=1.1, ls=(0, (5, 3)), zorder=1)
        if one.before is not None:
            axes.axhline(one.before, color=colour, lw=1, ls=":", zorder=1)
    drawing.frame(axes, ticks=5)
    axes.margins(x=0.06, y=0.12)
    axes.xaxis.set_minor_locator(NullLocator())
    drawing.legend(axes)


def _ticks(axes: Axes, scale: _Scale) -> None:
    places, names = list(scale.places.values()), list(scale.places)
    slanted = not scale.numeric and len(names) > 6
    texts = [f"{x:g}" for x in places] if scale.numeric else names
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter(texts if slanted else [drawing.wrapped(text, 13) for text in texts]))
    if slanted:
        axes.tick_params(axis="x", labelrotation=35)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    if scale.label:
        dashed = f"   (dashed: {', '.join(scale.levels)})" if scale.levels else ""
        axes.set_xlabel(f"{scale.label}{dashed}", color=drawing.INK)


def _effect(rows: Rows, name: str, look: drawing.Look) -> _Line:
    """Returns the gain or drop on a benchmark by layer, and as a level where all layers were tuned."""
    own = sorted((row for row in rows if row["benchmark"] == name), key=lambda row: float(row["x"] or 0))
    points = {row["x"]: Estimate(row["mean"], *ends(row), ()) for row in own if row["x"] is not None}
    levels = [row["mean"] for row in own if row["x"] is None]
    return _Line(f"{short(name, 20)}: {own[0]['measure']}", look, points, levels)


def _course(rows: Rows, name: str, look: drawing.Look) -> _Line:
    """Returns the scores on a benchmark after training, from the base model on."""
    own = sorted((row for row in rows if row["benchmark"] == name), key=lambda row: float(row["x"]))
    scale = 100.0 if own[0]["unit"] == "points" else 1.0
    before = scale * own[0]["before"]
    points = {0.0: Estimate(before, math.nan, math.nan, ())}
    for row in own:
        after = scale * row["after"]
        low, high = (end - row["mean"] for end in ends(row))
        # Gains and drops are changes in one direction or the other; around the score they are as wide.
        if (row["measure"] == "gain") != (row["unit"] == "points"):
            low, high = -high, -low
        points[row["x"]] = Estimate(after, after + low, after + high, ())
    return _Line(f"{short(name, 20)} ({_WORDS[own[0]['role']]})", look, points, (), before)
