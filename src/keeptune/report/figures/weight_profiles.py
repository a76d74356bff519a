"""What is in weights and their changes, by layer: energy (FARSS Fig. 1), change (L2-LoRA Fig. 6), curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from keeptune.report.estimates import layer_means, totals
from keeptune.report.figures import drawing
from keeptune.report.numbers import short

_MOST_LINES: Final = 8
_NUMBERED: Final = 16  # layers up to which cells hold numbers
_SIDES: Final = {"input": "input side", "output": "output side"}
Rows = Sequence[Mapping[str, Any]]


def energy_figure(rows: Rows, top: int, name: str) -> Figure | None:
    """Returns the share of the energy in the ``top`` singular values by layer, a line for each role and their mean.

    Rows have ``layer``, ``role`` and ``energy``; None when no target lies in a layer.
    """
    means = layer_means(rows)
    if not means:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["layer"] >= 0 and row["energy"] is not None:
            lines.setdefault(row["role"], []).append((row["layer"], row["energy"]))
    with drawing.themed():
        figure = drawing.page(7.0, 3.8)
        axes = figure.subplots()
        few = len(lines) <= _MOST_LINES
        for index, (role, places) in enumerate(lines.items()):
            label = short(role, 24) if few else f"{len(lines)} roles" if index == 0 else ""
            more = {"lw": 1.2, "ms": 4.5} | ({} if few else {"color": drawing.RULE})
            drawing.line(axes, sorted(places), drawing.look(index), label, **more)
        drawing.line(axes, list(means.items()), drawing.look(0), "mean", color=drawing.INK, lw=2.4, ms=6, zorder=5)
        axes.set_title(f"{short(name, 40)}: energy in the top {top} singular values")
        drawing.frame(axes, "layer", "share of the sum of squares", layers=True)
        axes.set_ylim(bottom=0)
        drawing.legend(axes)
        return drawing.finish(figure)


def change_figure(record: Mapping[str, Any]) -> Figure | None:
    """Returns maps of roles and layers of ``change.json``, and their profiles; None when no target is in a layer."""
    sources = [source for source in record["sources"] if source["layers"]]
    layers = sorted({int(layer) for source in sources for layer in source["layers"]})
    if not layers:
        return None
    roles = list(dict.fromkeys(row["role"] for source in sources for row in source["rows"] if row["layer"] >= 0))
    tables = [_changes(source["rows"], roles, layers) for source in sources]
    top = max(float(numpy.nanmax(table, initial=0.0)) for table in tables) or 1.0
    row = min(0.26, 6.0 / len(roles))
    heights = [row * len(roles) + 0.35] * len(sources) + [1.7, 1.7]
    numbered = len(layers) <= _NUMBERED and row >= 0.2
    with drawing.themed():
        wide = min(max(0.5 * len(layers) + 2.6, 6.0), 10.0)
        figure = drawing.page(wide, sum(heights) + 0.6)
        panels = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights})
        norm, colours = Normalize(0, top), drawing.colours_of("warm")
        write = (lambda value: f"{value:.1f}" if top < 100 else f"{value:.0f}") if numbered else None
        for axes, source, table in zip(panels, sources, tables, strict=False):
            drawing.heat_map(axes, table, colours, norm, write)
            axes.set_title(f"{short(source['label'], 60)}: change, % of the weight")
            drawing.layer_ticks(axes.set_yticks, [short(role, 18) for role in roles], row)
            drawing.layer_ticks(axes.set_xticks, layers, wide / (len(layers) + 4), 0.3)
        if not numbered:
            drawing.key(figure, list(panels[: len(sources)]), colours, norm, "%")
        profiles = (("relative", "% of the weights"), ("norm", "norm of the change"))
        for axes, (measure, up) in zip(panels[-2:], profiles, strict=True):
            _profiles(axes, sources, layers, measure)
            drawing.frame(axes, "", up, ticks=4)
            drawing.layer_ticks(axes.set_xticks, layers, wide / (len(layers) + 4), 0.3)
        panels[-2].set_title("all roles together")
        if len(sources) > 1:
            panels[-2].legend(labelcolor="linecolor", loc="best")
        panels[-1].set_xlabel("layer", color=drawing.INK)
        return drawing.finish(figure)


def _changes(rows: Rows, roles: Sequence[str], layers: Sequence[int]) -> numpy.ndarray:
    table = numpy.full((len(roles), len(layers)), math.nan)
    for (layer, role), total in totals(rows, "layer", "role").items():
        if layer in layers and total["relative"] is not None:
            table[roles.index(role), layers.index(layer)] = 100 * total["relative"]
    return table


def _profiles(axes: Axes, sources: Rows, layers: Sequence[int], measure: str) -> None:
    scale = 100.0 if measure == "relative" else 1.0
    for index, source in enumerate(sources):
        values = sorted((int(layer), total[measure]) for layer, total in source["layers"].items())
        places = [(layers.index(layer), scale * value) for layer, value in values if value is not None]
        drawing.line(axes, places, drawing.look(index), short(source["label"], 40))
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(bottom=0)


def curvature_figure(record: Mapping[str, Any]) -> Figure | None:
    """Returns the shares of updates by tenths of curvature and directions in ``curvature.json``; None without any."""
    sources: Rows = record["sources"]
    sides = [side for side in _SIDES if any(side in source["sides"] for source in sources)]
    if not sides:
        return None
    with drawing.themed():
        figure = drawing.page(3.7 * len(sides) + 1.6, 5.8)
        panels = figure.subplots(2, len(sides), squeeze=False)
        for column, side in enumerate(sides):
            for axes, measure in zip(panels[:, column], ("curvature", "directions"), strict=True):
                _shares(axes, sources, side, measure)
                drawing.frame(axes, f"tenth of the {measure}", "share of the update, %", layers=True)
            panels[0, column].set_title(_SIDES[side])
        drawing.legend(panels[0, -1], labelcolor=None)
        drawing.caption(figure, "1: the stiffest, 10: the most flexible; means over targets")
        return drawing.finish(figure)


def _shares(axes: Axes, sources: Rows, side: str, measure: str) -> None:
    own = [(index, source["sides"][side]) for index, source in enumerate(sources) if side in source["sides"]]
    for index, shares in own:
        places = [(place, 100 * share) for place, share in enumerate(shares[measure], 1)]
        drawing.line(axes, places, drawing.look(index), short(sources[index]["label"], 28))
    first = own[0][1]
    even = [1 / len(first[measure])] * len(first[measure])
    blind = first["isotropic"] if measure == "curvature" else even
    style: dict[str, Any] = {"color": drawing.INK, "lw": 1.1, "ls": (0, (5, 3)), "label": "blind to curvature"}
    axes.plot(range(1, len(blind) + 1), [100 * share for share in blind], **style)
    if measure == "directions":
        axes.set_ylim(bottom=0)
        return
    axes.axhline(100 * even[0], color=drawing.MUTED, lw=1, ls=":", label="in proportion to it")
    axes.set_yscale("log")  # most directions have little curvature: the last tenth holds nearly all of them
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
