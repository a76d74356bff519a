"""The benefit of each cell of a grid over a baseline, as numbers and as heat maps (LaLoRA Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from rich.console import Console

from keeptune.core.intervals import combine
from keeptune.report.grid import table_frame
from keeptune.report.heat import cells, short
from keeptune.report.style import MUTED, diverging, finish, page, themed
from keeptune.report.wording import signed

__all__ = ["benefit_figure", "benefits", "print_benefits"]

_BOTH: Final = "mean of learned and kept"
_WORDS: Final = {"knowledge": "keep", "task": "learn"}
Rows = Sequence[Mapping[str, Any]]


def benefits(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare each cell of a grid of two axes with the baseline, seed by seed.

    The benefit of a run is its score minus the baseline's of the same seed, in points (of a cross entropy, in nats per
    token, the other way round), so that more is better; without a baseline it is over the base model.

    Args:
        record: As in ``sweep.json``: ``rows``, ``grid`` with two axes, perhaps ``baseline``.

    Returns:
        For each benchmark ``name``, ``role``, ``unit``, ``cells`` (a list for each value of the first axis, of
        ``mean``, ``low``, ``high``, ``seeds``, None where every run failed), and the means over cells ``rows``,
        ``columns`` and ``mean`` (None where a cell is missing). Where both roles have accuracies, a last entry is the
        mean of what was learned and what was kept. Empty where the record has no grid of two axes.
    """
    grid = record.get("grid")
    if grid is None or len(grid["axes"]) != 2:
        return []
    rows: Rows = record["rows"]
    kinds = {item["name"]: item for row in rows for item in row["benchmarks"]}
    over = record.get("baseline")
    found = {name: _by_cell(rows, grid, name, over) for name in kinds}
    tables = [
        {"name": name, "role": kind["role"], "unit": _unit(kind), **_table(found[name], grid)}
        for name, kind in kinds.items()
    ]
    roles = {role: [n for n, k in kinds.items() if k["role"] == role and _unit(k) == "points"] for role in _WORDS}
    if all(roles.values()):
        both = _balanced([found[name] for name in roles["task"]], [found[name] for name in roles["knowledge"]])
        tables.append({"name": _BOTH, "role": "both", "unit": "points", **_table(both, grid)})
    return tables


def print_benefits(record: Mapping[str, Any], console: Console) -> None:
    """Print a table for each benchmark: the second axis to the right, the first downwards, means at the ends.

    Args:
        record: As in ``sweep.json``, with ``benefit``.
        console: Where to print.
    """
    (down, downs), (across, acrosses) = ((axis["key"], axis["values"]) for axis in record["grid"]["axes"])
    for table in record["benefit"]:
        decimals = _decimals(table["unit"])
        frame = table_frame()
        frame.title = f"{_title(table)}: {_unit_words(table['unit'])} over {_over(record)}"
        for head in (f"{_last(down)} \\ {_last(across)}", *map(_value, acrosses), "mean"):
            frame.add_column(head, justify="right", no_wrap=True)
        for value, line, mean in zip(downs, table["cells"], table["rows"], strict=True):
            texts = [_cell_text(cell, decimals) for cell in line]
            frame.add_row(_value(value), *texts, "–" if mean is None else signed(mean, decimals))
        means = [*table["columns"], table["mean"]]
        frame.add_row("mean", *("–" if mean is None else signed(mean, decimals) for mean in means))
        console.print(frame)


def benefit_figure(record: Mapping[str, Any]) -> Figure | None:
    """Draw a heat map for each benchmark, with the means over rows and columns beside it.

    Args:
        record: As in ``sweep.json``, with ``benefit``.

    Returns:
        The figure; None when no cell has a number.
    """
    tables = [table for table in record["benefit"] if numpy.isfinite(_numbers(table)).any()]
    if not tables:
        return None
    (down, downs), (across, acrosses) = ((axis["key"], axis["values"]) for axis in record["grid"]["axes"])
    wide = 2 if len(tables) == 4 else min(len(tables), 3)
    high = math.ceil(len(tables) / wide)
    tops = {unit: _largest(tables, unit) for unit in {table["unit"] for table in tables}}
    with themed():
        cell = 0.62
        figure = page(
            wide * (cell * (len(acrosses) + 1.2) + 0.75) + 0.2, high * (0.42 * (len(downs) + 1.2) + 0.75) + 0.35
        )
        panels = figure.subplots(high, wide, squeeze=False)
        for index, axes in enumerate(panels.flat):
            if index >= len(tables):
                axes.set_visible(False)
                continue
            _draw(axes, tables[index], tops[tables[index]["unit"]])
            _label(axes.set_xticks, axes.set_xlabel, acrosses, across)
            _label(axes.set_yticks, axes.set_ylabel, downs, down)
            axes.xaxis.label.set_x(0.5 * len(acrosses) / (len(acrosses) + 1))
        figure.supxlabel(_caption(record, tables), fontsize=8.5, color=MUTED, x=0.99, ha="right")
        return finish(figure)


def _by_cell(
    rows: Rows, grid: Mapping[str, Any], name: str, over: str | None
) -> dict[tuple[int, int], dict[int, float]]:
    """Read the benefit of each cell and seed on one benchmark."""
    scores: dict[tuple[str, int], Mapping[str, Any]] = {
        (row["name"], row["seed"]): item for row in rows for item in row["benchmarks"] if item["name"] == name
    }
    found: dict[tuple[int, int], dict[int, float]] = {}
    for (point, seed), item in scores.items():
        rival = item["before"] if over is None else scores.get((over, seed), {}).get("after")
        if point in grid["cells"] and rival is not None:
            down, across = grid["cells"][point]
            sign = -1.0 if _unit(item) == "nats" else 100.0
            found.setdefault((down, across), {})[seed] = sign * (item["after"] - rival)
    return found


def _balanced(
    task: Sequence[Mapping[tuple[int, int], Mapping[int, float]]],
    knowledge: Sequence[Mapping[tuple[int, int], Mapping[int, float]]],
) -> dict[tuple[int, int], dict[int, float]]:
    """Average over the benchmarks of each role, then over the two roles, where a run has them all."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    every = [*task, *knowledge]
    for place in every[0]:
        for seed in every[0][place]:
            if all(seed in one.get(place, {}) for one in every):
                sides = [math.fsum(one[place][seed] for one in side) / len(side) for side in (task, knowledge)]
                found.setdefault(place, {})[seed] = sum(sides) / 2
    return found


def _table(found: Mapping[tuple[int, int], Mapping[int, float]], grid: Mapping[str, Any]) -> dict[str, Any]:
    high, wide = (len(axis["values"]) for axis in grid["axes"])
    places = [[_cell(found.get((down, across), {})) for across in range(wide)] for down in range(high)]
    return {
        "cells": places,
        "rows": [_mean(line) for line in places],
        "columns": [_mean([line[across] for line in places]) for across in range(wide)],
        "mean": _mean([cell for line in places for cell in line]),
    }


def _cell(seeds: Mapping[int, float]) -> dict[str, Any] | None:
    estimate = combine([(value, math.nan, math.nan) for value in seeds.values()])
    if estimate is None:
        return None
    ends = {"low": estimate.low, "high": estimate.high} if estimate.has_interval else {"low": None, "high": None}
    return {"mean": estimate.mean, **ends, "seeds": {str(seed): value for seed, value in seeds.items()}}


def _mean(line: Sequence[Mapping[str, Any] | None]) -> float | None:
    """Average over cells; a mean without some of them would not compare with the others."""
    values = [cell["mean"] for cell in line if cell is not None]
    return math.fsum(values) / len(values) if values and len(values) == len(line) else None


def _numbers(table: Mapping[str, Any]) -> numpy.ndarray:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    lines = [
        [*(number(None if cell is None else cell["mean"]) for cell in line), number(mean)]
        for line, mean in zip(table["cells"], table["rows"], strict=True)
    ]
    return numpy.array([*lines, [*map(number, table["columns"]), number(table["mean"])]])


def _largest(tables: Rows, unit: str) -> float:
    largest = max(float(numpy.nanmax(numpy.abs(_numbers(t)), initial=0.0)) for t in tables if t["unit"] == unit)
    return max(largest, 1e-9)


def _draw(axes: Axes, table: Mapping[str, Any], top: float) -> None:
    numbers = _numbers(table)
    # The house's scale of colours is for losses.
    cells(axes, -numbers, diverging(), TwoSlopeNorm(0.0, -top, top), lambda v: signed(-v, _decimals(table["unit"])))
    high, wide = numbers.shape
    axes.axhline(high - 1.5, color="white", lw=5)
    axes.axvline(wide - 1.5, color="white", lw=5)
    axes.set_title(_title(table))


def _label(ticks: Any, label: Any, values: Sequence[Any], key: str) -> None:
    ticks(range(len(values) + 1), [*map(_value, values), "mean"])
    label(key)


def _value(value: Any) -> str:
    """Write the value of an axis."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if is_number else short(str(value), 16)


def _caption(record: Mapping[str, Any], tables: Rows) -> str:
    seeds = len({row["seed"] for row in record["rows"]})
    halves = sorted(
        (cell["high"] - cell["low"]) / 2
        for table in tables
        for line in table["cells"]
        for cell in line
        if table["unit"] == "points" and cell is not None and cell["low"] is not None
    )
    spread = f", 95% intervals of cells ±{halves[len(halves) // 2]:.1f} (median)" if halves else ""
    units = " or ".join(dict.fromkeys(_unit_words(table["unit"]) for table in tables))
    over = f"{units} over {_over(record)}; more is better"
    return f"{over}; {f'means of {seeds} seeds{spread}' if seeds > 1 else 'one seed'}"


def _unit(benchmark: Mapping[str, Any]) -> str:
    return "nats" if benchmark["metric"] == "cross_entropy" else "points"


def _unit_words(unit: str) -> str:
    return "nats/token" if unit == "nats" else unit


def _decimals(unit: str) -> int:
    return 3 if unit == "nats" else 1


def _title(table: Mapping[str, Any]) -> str:
    word = _WORDS.get(table["role"])
    return str(table["name"]) if word is None else f"{table['name']} ({word})"


def _over(record: Mapping[str, Any]) -> str:
    return str(record.get("baseline") or "the base model")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _cell_text(cell: Mapping[str, Any] | None, decimals: int) -> str:
    if cell is None:
        return "–"
    text = signed(cell["mean"], decimals)
    return text if cell["low"] is None else f"{text} ±{(cell['high'] - cell['low']) / 2:.{decimals}f}"
