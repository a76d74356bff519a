"""Figures of a plan's ranks and importances: layers by roles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from keeptune.report.heat import cells, short
from keeptune.report.records import PlanRow, Report, ReportLike, as_report
from keeptune.report.style import finish, page, themed
from keeptune.report.summary import methods

__all__ = ["importance_map", "plan_of", "rank_map", "uniform_rank"]


def uniform_rank(report: ReportLike, label: str) -> int | None:
    """Tell whether a method uses one rank everywhere.

    Args:
        report: The report.
        label: The method.

    Returns:
        That rank; None when ranks differ or are not known.

    Raises:
        ArtefactError: The report is malformed.
    """
    ranks = {row.rank for row in plan_of(as_report(report), label)}
    return ranks.pop() if len(ranks) == 1 else None


def rank_map(report: ReportLike, label: str) -> Figure | None:
    """Draw the ranks a method chose as a heat map of roles and layers.

    Args:
        report: The report.
        label: The method; the plan of its first seed is drawn.

    Returns:
        The figure; None when the method has no plan with layers and ranks.

    Raises:
        ArtefactError: The report is malformed.
    """
    found = _table(plan_of(as_report(report), label), lambda row: row.rank)
    if found is None:
        return None
    most = float(numpy.nanmax(found.values))
    colours = LinearSegmentedColormap.from_list("rank", ["#eef4f9", "#7fb2d9", "#0b5c96"])
    least = 0.3 if most >= 100 else 0.22
    return _map(found, colours, Normalize(0, most), lambda value: f"{value:.0f}", least, "rank")


def importance_map(report: ReportLike, label: str) -> Figure | None:
    """Draw the importances behind a plan (FARSS eq. 8) as a heat map of roles and layers, in logarithmic colours.

    Args:
        report: The report.
        label: The method; the plan of its first seed is drawn.

    Returns:
        The figure; None when the plan has no importance above 0.

    Raises:
        ArtefactError: The report is malformed.
    """
    rows = plan_of(as_report(report), label)
    found = _table(rows, lambda row: row.importance if (row.importance or 0) > 0 else None)
    if found is None:
        return None
    low, high = float(numpy.nanmin(found.values)), float(numpy.nanmax(found.values))
    colours = LinearSegmentedColormap.from_list("importance", ["#fdf3ec", "#f0a875", "#a63c06"])
    norm = LogNorm(low, high) if high > low * 1.001 else LogNorm(low / 2, high * 2)
    return _map(
        found, colours, norm, lambda value: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"), 0.5, "importance"
    )


@dataclass(frozen=True)
class _Table:
    """Numbers by role (rows) and layer (columns), NaN where there is none."""

    values: numpy.ndarray
    roles: Sequence[str]
    layers: Sequence[int]


def _table(rows: Sequence[PlanRow], read: Callable[[PlanRow], float | None]) -> _Table | None:
    placed = [
        (row.layer, row.role, value) for row in rows if row.layer is not None and (value := read(row)) is not None
    ]
    if not placed:
        return None
    # All layers of the plan, so that maps of one plan stand in line.
    layers = sorted({row.layer for row in rows if row.layer is not None})
    roles = list(dict.fromkeys(role for _, role, _ in placed))
    values = numpy.full((len(roles), len(layers)), math.nan)
    for layer, role, value in placed:
        values[roles.index(role), layers.index(layer)] = value
    return _Table(values, roles, layers)


def _map(
    table: _Table, colours: Colormap, norm: Normalize, write: Callable[[float], str], least: float, name: str
) -> Figure:
    """Draw a heat map of roles and layers, with numbers where cells are at least so many inches wide.

    Args:
        table: The numbers.
        colours: The colour map.
        norm: The scale.
        write: Prints a number.
        least: The least width of a cell that holds a number.
        name: What the numbers are.

    Returns:
        The figure.
    """
    with themed():
        cell, row = min(0.55, 5.8 / len(table.layers)), min(0.28, 11.0 / len(table.roles))
        numbered = cell >= least and row >= 0.2
        width = cell * len(table.layers) + 1.25 + (0 if numbered else 0.9)
        figure = page(max(width, 2.6), max(row * len(table.roles) + 0.6, 1.1 if numbered else 1.5))
        axes = figure.subplots()
        cells(axes, table.values, colours, norm, write if numbered else None)
        if not numbered:
            bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=12, pad=0.02)
            bar.set_label(name)
            bar.outline.set_visible(False)
            if isinstance(norm, LogNorm):
                _log_ticks(bar.ax.yaxis, norm)
        _layer_ticks(axes, table.layers, cell)
        stride = max(math.ceil(0.16 / row), 1)
        shown = range(0, len(table.roles), stride)
        axes.set_yticks(list(shown), [short(table.roles[place], 18) for place in shown])
        axes.set_xlabel("layer")
        return finish(figure)


def _log_ticks(axis: Axis, norm: LogNorm) -> None:
    low, high = float(norm.vmin or 1), float(norm.vmax or 1)
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=6))
    axis.set_minor_locator(NullLocator())
    # The usual log labels are mathematics, which the theme turns off.
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))


def _layer_ticks(axes: Axes, layers: Sequence[int], cell: float) -> None:
    """Number the layers, skipping some where cells are narrow.

    Args:
        axes: The plot.
        layers: The layers.
        cell: The width of a cell in inches.
    """
    stride = max(math.ceil(0.22 / cell), 1)
    places = range(0, len(layers), stride)
    axes.set_xticks(list(places), [str(layers[place]) for place in places])


def plan_of(report: Report, label: str) -> tuple[PlanRow, ...]:
    """Find the plan of a method.

    Args:
        report: The report.
        label: The method.

    Returns:
        The plan of its first run that has one; empty when there is none.
    """
    plans = [run.plan for method in methods(report) if method.label == label for run in method.runs if run.plan]
    return plans[0] if plans else ()
