"""Figures and tables of nodes: where the highest and lowest lie (LoKI Fig. 2), votes behind a plan, overlaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich.console import Console

from keeptune.report.grid import table_frame
from keeptune.report.heat import short
from keeptune.report.layers import plan_of
from keeptune.report.records import ReportLike, as_report
from keeptune.report.style import INK, MUTED, bare, finish, page, themed
from keeptune.report.tables import print_comparison

__all__ = [
    "density_figure",
    "overlap_figure",
    "print_overlap",
    "print_suppressed",
    "votes_figure",
]

_HIGH: Final = ("#fdf0e9", "#f0a875", "#c44e12", "#6b2503")
_LOW: Final = ("#edf4fa", "#7fb2d9", "#0b5c96", "#04304f")
_BINS: Final = 64


def density_figure(record: Mapping[str, Any]) -> Figure:
    """Draw where the highest and the lowest nodes lie, and how much each block's MLP carries.

    Args:
        record: As in ``suppress.json``: ``density``, ``profile`` and ``layers``.

    Returns:
        The figure: a strip of nodes for each block, in logarithmic colours; bars beside them.
    """
    found, layers = record["density"], record["layers"]
    tables = [numpy.asarray(found[name], dtype=float) for name in ("highest", "lowest")]
    edges = numpy.asarray(found["edges"], dtype=float)
    norm = _log_scale(numpy.concatenate(tables))
    with themed():
        row = min(0.3, 6.0 / len(layers))
        figure = page(7.6, 2 * max(row * len(layers), 0.9) + 1.35)
        grid = figure.subplots(2, 2, width_ratios=(5, 1), sharey=True, squeeze=False)
        words = [f"{name} {found['q']:g}% of all nodes" for name in ("highest", "lowest")]
        for (strips, bars), table, stops, title in zip(grid, tables, (_HIGH, _LOW), words, strict=True):
            colours = LinearSegmentedColormap.from_list("nodes", stops)
            _strips(strips, edges, table, colours, norm)
            strips.set_title(title)
            _number_layers(strips, layers, row)
            bars.barh(range(len(layers)), record["profile"], color=stops[1], height=0.8)
            bars.set_xlim(0, 1)
            bars.xaxis.set_major_locator(MaxNLocator(2))
            bare(bars, ("left",))
            _key(figure, bars, colours, norm)
        grid[1][0].set_xlabel("node")
        grid[1][1].set_xlabel("∑|attribution|,\nlargest = 1")
        grid[0][0].tick_params(labelbottom=False)
        grid[0][1].tick_params(labelbottom=False)
        return finish(figure)


def votes_figure(report: ReportLike, label: str) -> Figure | None:
    """Draw how many texts named each node, block by block, behind a plan that counts votes (LoKI).

    Args:
        report: The report.
        label: The method; the plan of its first seed is drawn.

    Returns:
        The figure; None when the plan has no votes.

    Raises:
        ArtefactError: The report is malformed.
    """
    rows = [row for row in plan_of(as_report(report), label) if len(row.evidence.get("votes", ())) > 1]
    if not rows or len({len(row.evidence["votes"]) for row in rows}) > 1:
        return None
    votes = numpy.asarray([row.evidence["votes"] for row in rows], dtype=float)
    nodes = votes.shape[1]
    edges = numpy.linspace(0, nodes, min(nodes, _BINS) + 1).round().astype(int)
    table = numpy.add.reduceat(votes, edges[:-1], axis=1) / numpy.diff(edges)
    if not table.max() > 0:
        return None
    with themed():
        row = min(0.3, 6.0 / len(rows))
        figure = page(7.0, max(row * len(rows), 0.7) + 0.8)
        axes = figure.subplots()
        norm, colours = _log_scale(table), LinearSegmentedColormap.from_list("nodes", _LOW)
        _strips(axes, edges.astype(float), table, colours, norm)
        _number_layers(axes, [-1 if row.layer is None else row.layer for row in rows], row)
        axes.set_xlabel("node")
        _key(figure, axes, colours, norm)
        return finish(figure)


def overlap_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the share of common rows of each block, beside what chance would give.

    Args:
        record: As in ``overlap.json``.

    Returns:
        The figure.
    """
    rows = record["by_layer"]
    places = range(len(rows))
    with themed():
        figure = page(min(max(0.3 * len(rows) + 1.6, 4.2), 9.0), 3.0)
        axes = figure.subplots()
        axes.bar(places, [_or_zero(row["share"]) for row in rows], color="#7fb2d9", width=0.7, label="common rows")
        chance = [math.nan if row["chance"] is None else row["chance"] for row in rows]
        axes.scatter(places, chance, marker="_", s=160, color=INK, lw=1.6, label="by chance", zorder=3)
        for place, row in enumerate(rows):
            if row["share"] is None:
                axes.text(place, 0.02, "none", color=MUTED, ha="center", fontsize=8)
        stride = max(math.ceil(len(rows) / 24), 1)
        axes.set_xticks(places[::stride], [str(row["layer"]) for row in rows][::stride])
        axes.set_ylim(0, 1)
        axes.set_xlabel("layer")
        axes.set_ylabel("share of the selected rows")
        axes.grid(visible=True, axis="y")
        bare(axes, ("bottom",))
        axes.set_title(f"{short(record['first']['name'], 34)} and {short(record['second']['name'], 34)}", fontsize=9.5)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        return finish(figure)


def print_suppressed(record: Mapping[str, Any], console: Console) -> None:
    """Print what suppression costs.

    Args:
        record: As in ``suppress.json``.
        console: Where to print.
    """
    numbers = [sum(map(len, entry["rows"])) for entry in record["methods"]]
    console.print(
        f"{numbers[0]} of {record['nodes'] * len(record['layers'])} nodes give zero ({record['q']:g}%, "
        f"{record['over']}), attributed over {record['texts']} texts; S-H: the highest, S-L: the lowest",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    print_comparison(record, console)
    for gap in record["gaps"]:
        low, high = gap["interval"]
        told = f"{gap['name']}: S-L less S-H {gap['S-L less S-H']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def print_overlap(record: Mapping[str, Any], console: Console) -> None:
    """Print an overlap, layer by layer and in all.

    Args:
        record: As in ``overlap.json``.
        console: Where to print.
    """
    for side in ("first", "second"):
        told = record[side]
        line = f"{side}: {told['name']}, {told['texts']} texts"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = table_frame()
    for head in ("layer", "first", "second", "common", "share", "by chance"):
        table.add_column(head, justify="right")
    for row in [*record["by_layer"], {"layer": "all", **record["all"]}]:
        shares = ["–" if row[key] is None else f"{row[key]:.1%}" for key in ("share", "chance")]
        table.add_row(str(row["layer"]), *(str(row[key]) for key in ("first", "second", "common")), *shares)
    console.print(table)


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value


def _log_scale(table: numpy.ndarray) -> LogNorm:
    positive = table[table > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    low = max(low, high / 1e3)  # a single text among thousands would take most of the scale
    return LogNorm(low, high) if high > low * 1.001 else LogNorm(low / 2, high * 2)


def _strips(axes: Axes, edges: numpy.ndarray, table: numpy.ndarray, colours: Colormap, norm: Normalize) -> None:
    """Draw a strip for each block; bins that no text named stay white."""
    rows = numpy.arange(len(table) + 1) - 0.5
    shown = numpy.ma.masked_less_equal(table, 0.0)
    axes.pcolormesh(edges, rows, shown, cmap=colours, norm=norm, rasterized=False, linewidth=0)
    axes.hlines(rows[1:-1], edges[0], edges[-1], color="white", lw=1.2 if len(table) <= 16 else 0.4)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel("layer")
    bare(axes)


def _number_layers(axes: Axes, layers: Sequence[int], row: float) -> None:
    stride = max(math.ceil(0.16 / row), 1)
    shown = range(0, len(layers), stride)
    axes.set_yticks(list(shown), [str(layers[place]) for place in shown])


def _key(figure: Figure, axes: Axes, colours: Colormap, norm: LogNorm) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=14, pad=0.04)
    bar.set_label("texts that name a node", fontsize=8.5)
    bar.outline.set_visible(False)
    low, high = float(norm.vmin or 1), float(norm.vmax or 1)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=5))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    # The usual log labels are mathematics, which the theme turns off.
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
