"""Where the highest and lowest nodes of MLPs lie (LoKI Fig. 2), and how selections overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from keeptune.report.figures import drawing
from keeptune.report.numbers import short


def density_figure(record: Mapping[str, Any]) -> Figure:
    """Returns a map of where the highest and lowest nodes of ``suppress.json`` lie, and how much each MLP carries."""
    density, layers = record["density"], record["layers"]
    tables = [numpy.asarray(density[name], dtype=float) for name in ("highest", "lowest")]
    edges = numpy.asarray(density["edges"], dtype=float)
    norm = _log_scale(numpy.concatenate(tables))
    with drawing.themed():
        row = min(0.3, 6.0 / len(layers))
        figure = drawing.page(7.6, 2 * max(row * len(layers), 0.9) + 1.35)
        grid = figure.subplots(2, 2, width_ratios=(5, 1), sharey=True, squeeze=False)
        kinds = zip(grid, tables, ("warm", "cool"), ("highest", "lowest"), strict=True)
        for (strips, profile), table, scale, name in kinds:
            colours = drawing.colours_of(scale)
            _strips(strips, edges, table, colours, norm)
            strips.set_title(f"{name} {density['q']:g}% of all nodes")
            drawing.layer_ticks(strips.set_yticks, layers, row, 0.16)
            profile.barh(range(len(layers)), record["profile"], color=colours(0.4), height=0.8)
            profile.set_xlim(0, 1)
            profile.xaxis.set_major_locator(MaxNLocator(2))
            drawing.bare(profile, ("left",))
            _log_key(figure, profile, colours, norm)
        grid[1][0].set_xlabel("node")
        grid[1][1].set_xlabel("∑|attribution|,\nlargest = 1")
        for axes in grid[0]:
            axes.tick_params(labelbottom=False)
        return drawing.finish(figure)


def overlap_figure(record: Mapping[str, Any]) -> Figure:
    """Returns the share of common rows of each block, beside what chance would give, from ``overlap.json``."""
    rows = record["by_layer"]
    places = range(len(rows))
    with drawing.themed():
        wide = min(max(0.3 * len(rows) + 1.6, 4.2), 9.0)
        figure = drawing.page(wide, 3.0)
        axes = figure.subplots()
        axes.bar(places, [row["share"] or 0.0 for row in rows], color="#7fb2d9", width=0.7, label="common rows")
        chance = [math.nan if row["chance"] is None else row["chance"] for row in rows]
        axes.scatter(places, chance, marker="_", s=160, color=drawing.INK, lw=1.6, label="by chance", zorder=3)
        for place, row in enumerate(rows):
            if row["share"] is None:
                axes.text(place, 0.02, "none", color=drawing.MUTED, ha="center", fontsize=8)
        drawing.layer_ticks(axes.set_xticks, [row["layer"] for row in rows], wide / (len(rows) + 4), 0.28)
        axes.set_ylim(0, 1)
        axes.set_xlabel("layer")
        axes.set_ylabel("share of the selected rows")
        axes.grid(visible=True, axis="y")
        drawing.bare(axes, ("bottom",))
        axes.set_title(f"{short(record['first']['name'], 34)} and {short(record['second']['name'], 34)}", fontsize=9.5)
        figure.legend(loc="outside lower center", ncols=2)
        return drawing.finish(figure)


def _log_scale(table: numpy.ndarray) -> LogNorm:
    positive = table[table > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    low = max(low, high / 1e3)  # a single text among thousands would take most of the scale
    return LogNorm(low, high) if high > low * 1.001 else LogNorm(low / 2, high * 2)


def _strips(axes: Axes, edges: numpy.ndarray, table: numpy.ndarray, colours: Colormap, norm: LogNorm) -> None:
    """Draws a strip for each block; bins that no text named stay white."""
    rows = numpy.arange(len(table) + 1) - 0.5
    axes.pcolormesh(edges, rows, numpy.ma.masked_less_equal(table, 0.0), cmap=colours, norm=norm, linewidth=0)
    axes.hlines(rows[1:-1], edges[0], edges[-1], color="white", lw=1.2 if len(table) <= 16 else 0.4)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel("layer")
    drawing.bare(axes)


def _log_key(figure: Figure, axes: Axes, colours: Colormap, norm: LogNorm) -> None:
    bar = drawing.key(figure, axes, colours, norm, "texts that name a node")
    low, high = float(norm.vmin or 1), float(norm.vmax or 1)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=5))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    # The usual log labels are mathematics, which the theme turns off.
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
