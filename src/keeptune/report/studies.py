"""The figures and tables of studies over layers: L2-LoRA's Fig. 4 and its Tables 5 and 6."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from rich.console import Console
from rich.table import Table

from keeptune.core.intervals import combine
from keeptune.report.grid import table_frame
from keeptune.report.heat import short
from keeptune.report.style import INK, MUTED, RULE, bare, finish, page, themed
from keeptune.report.wording import number, signed

__all__ = ["print_study", "study_figure", "study_rows"]

_BLUES: Final = ("#0072b2", "#3a87b8", "#7fb2d9", "#332288")
_REDS: Final = ("#d55e00", "#b0482a", "#e69f00", "#882255")
_ROUND: Final = ("o", "p", "h", "8")
_CORNERED: Final = ("s", "^", "D", "v")
_TITLES: Final = {
    "single": "tuning one layer at a time",
    "bottom": "tuning the lowest layers",
    "top": "tuning the highest layers",
}
Rows = Sequence[Mapping[str, Any]]


def study_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put the seeds of each cell together: what was gained on the task and what knowledge was dropped.

    Args:
        record: As in ``layers.json``: its ``rows`` are the runs.

    Returns:
        For each cell and benchmark ``point``, ``x``, ``benchmark``, ``role``, ``unit`` (points, or nats of a cross
        entropy), ``before`` and ``after`` (mean over seeds, in the benchmark's own unit), ``measure`` (gain for a task,
        drop for knowledge), its ``mean`` and 95% interval ``low``, ``high``, over seeds and items as in reports.
    """
    found = []
    for point in dict.fromkeys(row["name"] for row in record["rows"]):
        runs = [row for row in record["rows"] if row["name"] == point]
        for name in dict.fromkeys(item["name"] for run in runs for item in run["benchmarks"]):
            items = [item for run in runs for item in run["benchmarks"] if item["name"] == name]
            estimate = combine([_effect(item) for item in items])
            if estimate is None:
                continue
            first = items[0]
            found.append(
                {
                    "point": point,
                    "x": runs[0]["x"],
                    "benchmark": name,
                    "role": first["role"],
                    "unit": _unit(first),
                    "seeds": [run["seed"] for run in runs],
                    "before": math.fsum(item["before"] for item in items) / len(items),
                    "after": math.fsum(item["after"] for item in items) / len(items),
                    "measure": "drop" if first["role"] == "knowledge" else "gain",
                    "mean": estimate.mean,
                    "low": estimate.low if estimate.has_interval else None,
                    "high": estimate.high if estimate.has_interval else None,
                }
            )
    return found


def print_study(record: Mapping[str, Any], console: Console) -> None:
    """Print a row for each cell, ± half the 95% interval; for bottom and top, the first is the base model.

    Args:
        record: As in ``layers.json``, with ``summary``.
        console: Where to print.
    """
    rows: Rows = record["summary"]
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    kinds = {row["benchmark"]: row for row in rows}
    table: Table = table_frame()
    table.add_column("tuned")
    for name in names:
        table.add_column(f"{name} after", justify="right")
        unit = "nats" if kinds[name]["unit"] == "nats" else "points"
        table.add_column(f"{kinds[name]['measure']}, {unit}", justify="right")
    if record["study"] != "single":
        table.add_row("none", *(text for name in names for text in (number(kinds[name]["before"]), "")))
    for point in dict.fromkeys(row["point"] for row in rows):
        own = {row["benchmark"]: row for row in rows if row["point"] == point}
        table.add_row(point, *(text for name in names for text in _texts(own.get(name))))
    console.print(table)


def study_figure(record: Mapping[str, Any]) -> Figure | None:
    """Draw gains and drops by layer, or scores by the number of trainable layers.

    Blue is what is learned, red what is kept or lost. Bars are 95% intervals over seeds and items.

    Args:
        record: As in ``layers.json``, with ``summary``.

    Returns:
        The figure; None when there is no number to draw.
    """
    rows: Rows = record["summary"]
    single = record["study"] == "single"
    units = [unit for unit in ("points", "nats") if any(row["unit"] == unit and row["x"] is not None for row in rows)]
    if not units:
        return None
    with themed():
        figure = page(7.0, 2.9 * len(units) + 0.5)
        for axes, unit in zip(figure.subplots(len(units), 1, sharex=True, squeeze=False).flat, units, strict=True):
            (_effects if single else _scores)(axes, [row for row in rows if row["unit"] == unit])
            _frame(axes, sorted({row["x"] for row in rows if row["x"] is not None} | (set() if single else {0})))
            measures = dict.fromkeys(row["measure"] for row in rows if row["unit"] == unit)
            axes.set_ylabel(_axis_name(unit, measures if single else ()))
        figure.axes[0].set_title(_TITLES[record["study"]])
        figure.axes[-1].set_xlabel(record["axis"], color=INK)
        level = "dashed: all of them; " if single and any(row["x"] is None for row in rows) else ""
        seeds = max(len(row["seeds"]) for row in rows)
        over = f"{seeds} seeds and the items" if seeds > 1 else "the items, one seed"
        figure.supxlabel(f"{level}bars: 95% intervals over {over}", fontsize=8.5, color=MUTED, x=0.99, ha="right")
        return finish(figure)


def _effect(item: Mapping[str, Any]) -> tuple[float, float, float]:
    """Take the gain on a task or the drop of knowledge, with its interval."""
    better = -1.0 if _unit(item) == "nats" else 100.0
    sign = -better if item["role"] == "knowledge" else better
    low, high = sorted(sign * end for end in item["interval"])
    return sign * (item["after"] - item["before"]), low, high


def _unit(item: Mapping[str, Any]) -> str:
    return "nats" if item["metric"] == "cross_entropy" else "points"


def _effects(axes: Axes, rows: Rows) -> None:
    """Draw a line for each benchmark, and a level where all layers were tuned."""
    for name, colour, shape in _looks(rows):
        own = [row for row in rows if row["benchmark"] == name]
        placed = sorted((row for row in own if row["x"] is not None), key=lambda row: float(row["x"]))
        label = f"{short(name, 20)}: {own[0]['measure']}"
        _line(axes, [(row["x"], row["mean"], row["low"], row["high"]) for row in placed], colour, shape, label)
        for row in own:
            if row["x"] is None:
                axes.axhline(row["mean"], color=colour, lw=1.1, ls=(0, (5, 3)), zorder=1)
    axes.axhline(0, color=RULE, lw=1, zorder=0)


def _scores(axes: Axes, rows: Rows) -> None:
    """Draw the scores after training from the base model on."""
    for name, colour, shape in _looks(rows):
        own = sorted((row for row in rows if row["benchmark"] == name), key=lambda row: float(row["x"]))
        scale = 100.0 if own[0]["unit"] == "points" else 1.0
        # Gains and drops are changes in one direction or the other; around the score they are as wide.
        places = [(0.0, scale * own[0]["before"], None, None)]
        for row in own:
            after = scale * row["after"]
            rises = (row["measure"] == "gain") == (row["unit"] == "points")
            ends = (row["low"] - row["mean"], row["high"] - row["mean"]) if row["low"] is not None else (None, None)
            if ends[0] is not None and ends[1] is not None:
                ends = ends if rises else (-ends[1], -ends[0])
                places.append((row["x"], after, after + ends[0], after + ends[1]))
            else:
                places.append((row["x"], after, None, None))
        word = "keep" if own[0]["role"] == "knowledge" else "learn"
        _line(axes, places, colour, shape, f"{short(name, 20)} ({word})")
        axes.axhline(places[0][1], color=colour, lw=1, ls=":", zorder=1)


def _looks(rows: Rows) -> list[tuple[str, str, str]]:
    kinds = {row["benchmark"]: row["role"] for row in rows}
    found = []
    for role, colours, shapes in (("task", _BLUES, _ROUND), ("knowledge", _REDS, _CORNERED)):
        for index, name in enumerate(name for name, own in kinds.items() if own == role):
            found.append((name, colours[index % len(colours)], shapes[index % len(shapes)]))
    return found


def _line(
    axes: Axes, places: Sequence[tuple[float, float, float | None, float | None]], colour: str, shape: str, label: str
) -> None:
    axes.plot(
        [place[0] for place in places],
        [place[1] for place in places],
        color=colour,
        marker=shape,
        ms=5.5,
        mec="white",
        mew=0.6,
        lw=1.6,
        zorder=4,
        label=label,
    )
    for x, _, low, high in places:
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, lw=1.6, alpha=0.7, zorder=3)


def _frame(axes: Axes, places: Sequence[float]) -> None:
    axes.grid(visible=True)
    bare(axes, ("left", "bottom"))
    axes.spines["left"].set_color(RULE)
    axes.margins(x=0.06, y=0.12)
    axes.xaxis.set_major_locator(FixedLocator(places) if len(places) <= 16 else MaxNLocator(12, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor="linecolor")


def _axis_name(unit: str, measures: Iterable[str]) -> str:
    told = " or ".join(sorted(measures, reverse=True))
    if unit == "points":
        return f"{told}, points" if told else "score, %"
    return f"{told}, nats/token" if told else "nats/token"


def _texts(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "–", "–"
    decimals = 3 if row["unit"] == "nats" else 1
    text = signed(row["mean"], decimals)
    if row["low"] is not None:
        text += f" ±{(row['high'] - row['low']) / 2:.{decimals}f}"
    return number(row["after"]), text
