"""The benefit of each cell of a grid over a baseline, as heat maps (LaLoRA Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from keeptune.report.figures import drawing
from keeptune.report.numbers import axis_value, signed, unit_words
from keeptune.report.tables.analyses import benefit_title

Rows = Sequence[Mapping[str, Any]]


def benefit_figure(record: Mapping[str, Any]) -> Figure | None:
    """Returns a map for each benchmark of a grid of two axes in ``runs.json``, with means; None without a number."""
    tables = [table for table in record["benefit"] if numpy.isfinite(_numbers(table)).any()]
    if not tables:
        return None
    (down, downs), (across, acrosses) = ((axis["key"], axis["values"]) for axis in record["grid"]["axes"])
    wide = 2 if len(tables) == 4 else min(len(tables), 3)
    high = math.ceil(len(tables) / wide)
    tops: dict[str, float] = {}
    for table in tables:
        largest = float(numpy.nanmax(numpy.abs(_numbers(table)), initial=0.0))
        tops[table["unit"]] = max(tops.get(table["unit"], 1e-9), largest)
    with drawing.themed():
        size = wide * (0.62 * (len(acrosses) + 1.2) + 0.75) + 0.2, high * (0.42 * (len(downs) + 1.2) + 0.75) + 0.35
        figure = drawing.page(*size)
        panels = list(figure.subplots(high, wide, squeeze=False).flat)
        for axes, table in zip(panels, tables, strict=False):
            _draw(axes, table, tops[table["unit"]])
            axes.set_xticks(range(len(acrosses) + 1), [*map(axis_value, acrosses), "mean"])
            axes.set_yticks(range(len(downs) + 1), [*map(axis_value, downs), "mean"])
            axes.set_xlabel(across, x=0.5 * len(acrosses) / (len(acrosses) + 1))
            axes.set_ylabel(down)
        for axes in panels[len(tables) :]:
            axes.set_visible(False)
        drawing.caption(figure, _words(record, tables))
        return drawing.finish(figure)


def _numbers(table: Mapping[str, Any]) -> numpy.ndarray:
    lines = [
        [*(None if cell is None else cell["mean"] for cell in line), mean]
        for line, mean in zip(table["cells"], table["rows"], strict=True)
    ]
    return numpy.array([*lines, [*table["columns"], table["mean"]]], dtype=float)


def _draw(axes: Axes, table: Mapping[str, Any], top: float) -> None:
    numbers = _numbers(table)
    decimals = 3 if table["unit"] == "nats" else 1
    drawing.heat_map(
        axes, numbers, drawing.colours_of("gains"), TwoSlopeNorm(0.0, -top, top), lambda value: signed(value, decimals)
    )
    axes.axhline(numbers.shape[0] - 1.5, color="white", lw=5)
    axes.axvline(numbers.shape[1] - 1.5, color="white", lw=5)
    axes.set_title(benefit_title(table))


def _words(record: Mapping[str, Any], tables: Rows) -> str:
    seeds = len({row["seed"] for row in record["rows"]})
    halves = sorted(
        (cell["high"] - cell["low"]) / 2
        for table in tables
        for line in table["cells"]
        for cell in line
        if table["unit"] == "points" and cell is not None and cell["low"] is not None
    )
    spread = f", 95% intervals of cells ±{halves[len(halves) // 2]:.1f} (median)" if halves else ""
    units = " or ".join(dict.fromkeys(unit_words(table["unit"]) for table in tables))
    over = f"{units} over {record.get('baseline') or 'the base model'}; more is better"
    return f"{over}; {f'means of {seeds} seeds{spread}' if seeds > 1 else 'one seed'}"
