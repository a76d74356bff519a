"""Studies over layers: gains and drops by layer (L2-LoRA Fig. 4), or scores by the number of trainable layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from keeptune.report.figures.drawing import (
    INK,
    RULE,
    Look,
    bars,
    caption,
    finish,
    frame,
    legend,
    line,
    page,
    themed,
)
from keeptune.report.numbers import ends, short

__all__ = ["study_figure"]

_LOOKS: Final = {
    "task": (("#0072b2", "o"), ("#3a87b8", "p"), ("#7fb2d9", "h"), ("#332288", "8")),
    "knowledge": (("#d55e00", "s"), ("#b0482a", "^"), ("#e69f00", "D"), ("#882255", "v")),
}
_TITLES: Final = {
    "single": "tuning one layer at a time",
    "bottom": "tuning the lowest layers",
    "top": "tuning the highest layers",
}
Rows = Sequence[Mapping[str, Any]]


def study_figure(record: Mapping[str, Any]) -> Figure | None:
    """Returns gains and drops by layer, or scores by the number of trainable layers.

    Args:
        record: As in ``runs.json``, with its ``summary``.

    Returns:
        The figure; None when no cell has a place.
    """
    rows: Rows = record["summary"]
    single = record["study"] == "single"
    units = [unit for unit in ("points", "nats") if any(row["unit"] == unit and row["x"] is not None for row in rows)]
    if not units:
        return None
    with themed():
        figure = page(7.0, 2.9 * len(units) + 0.5)
        for axes, unit in zip(figure.subplots(len(units), 1, sharex=True, squeeze=False).flat, units, strict=True):
            own = [row for row in rows if row["unit"] == unit]
            (_effects if single else _scores)(axes, own)
            frame(axes, "", _axis_name(unit, {row["measure"] for row in own} if single else ()), ticks=5)
            axes.margins(x=0.06, y=0.12)
            _layer_axis(axes, sorted({row["x"] for row in rows if row["x"] is not None} | (set() if single else {0})))
            legend(axes)
        figure.axes[0].set_title(_TITLES[record["study"]])
        figure.axes[-1].set_xlabel(record["axis"], color=INK)
        level = "dashed: all of them; " if single and any(row["x"] is None for row in rows) else ""
        seeds = max(len(row["seeds"]) for row in rows)
        over = f"{seeds} seeds and the items" if seeds > 1 else "the items, one seed"
        caption(figure, f"{level}bars: 95% intervals over {over}")
        return finish(figure)


def _layer_axis(axes: Axes, places: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(places) if len(places) <= 16 else MaxNLocator(12, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _effects(axes: Axes, rows: Rows) -> None:
    """Draws a line for each benchmark, and a level where all layers were tuned."""
    for name, drawn in _looks(rows):
        own = [row for row in rows if row["benchmark"] == name]
        placed = sorted((row for row in own if row["x"] is not None), key=lambda row: float(row["x"]))
        line(axes, [(row["x"], row["mean"]) for row in placed], drawn, f"{short(name, 20)}: {own[0]['measure']}")
        bars(axes, [(row["x"], *ends(row)) for row in placed], drawn.colour)
        for row in own:
            if row["x"] is None:
                axes.axhline(row["mean"], color=drawn.colour, lw=1.1, ls=(0, (5, 3)), zorder=1)
    axes.axhline(0, color=RULE, lw=1, zorder=0)


def _scores(axes: Axes, rows: Rows) -> None:
    """Draws the scores after training from the base model on."""
    for name, drawn in _looks(rows):
        own = sorted((row for row in rows if row["benchmark"] == name), key=lambda row: float(row["x"]))
        scale = 100.0 if own[0]["unit"] == "points" else 1.0
        places = [(0.0, scale * own[0]["before"], math.nan, math.nan)]
        for row in own:
            after = scale * row["after"]
            low, high = (end - row["mean"] for end in ends(row))
            # Gains and drops are changes in one direction or the other; around the score they are as wide.
            if (row["measure"] == "gain") != (row["unit"] == "points"):
                low, high = -high, -low
            places.append((row["x"], after, after + low, after + high))
        word = "keep" if own[0]["role"] == "knowledge" else "learn"
        line(axes, [place[:2] for place in places], drawn, f"{short(name, 20)} ({word})")
        bars(axes, [(x, low, high) for x, _, low, high in places], drawn.colour)
        axes.axhline(places[0][1], color=drawn.colour, lw=1, ls=":", zorder=1)


def _looks(rows: Rows) -> list[tuple[str, Look]]:
    kinds = {row["benchmark"]: row["role"] for row in rows}
    looks = []
    for role, choices in _LOOKS.items():
        for index, name in enumerate(name for name, own in kinds.items() if own == role):
            colour, shape = choices[index % len(choices)]
            looks.append((name, Look(colour, shape, "-", colour)))
    return looks


def _axis_name(unit: str, measures: Iterable[str]) -> str:
    words = " or ".join(sorted(measures, reverse=True))
    if unit == "points":
        return f"{words}, points" if words else "score, %"
    return f"{words}, nats/token" if words else "nats/token"
