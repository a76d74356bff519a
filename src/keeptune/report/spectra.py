"""Figures of the spectra behind a plan, and which part of them it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from keeptune.report.heat import short
from keeptune.report.layers import plan_of
from keeptune.report.records import PlanRow, ReportLike, as_report
from keeptune.report.style import MUTED, RULE, bare, finish, page, themed

__all__ = ["evidence_names", "kept_places", "kept_spectra", "spectra"]

_ALL: Final = "spectrum"
_KEPT: Final = "singular_values"
_MOST_LINES: Final = 6


def evidence_names(report: ReportLike, label: str) -> list[str]:
    """List the kinds of spectra in a method's plan.

    Args:
        report: The report.
        label: The method.

    Returns:
        The names, in order of first appearance.

    Raises:
        ArtefactError: The report is malformed.
    """
    rows = plan_of(as_report(report), label)
    return list(dict.fromkeys(name for row in rows for name, values in row.evidence.items() if len(values) > 1))


def spectra(report: ReportLike, label: str, evidence: str) -> Figure | None:
    """Draw spectra on a log axis: a panel for each role, a line for each layer.

    Args:
        report: The report.
        label: The method.
        evidence: Which spectra, one of `evidence_names`.

    Returns:
        The figure, with at most eight roles; None when there are no positive values.

    Raises:
        ArtefactError: The report is malformed.
    """
    rows = [row for row in plan_of(as_report(report), label) if any(v > 0 for v in row.evidence.get(evidence, ()))]
    axes = _Axes("index", evidence.replace("_", " "), _frame_values, keyed=True)
    return _panels(rows, axes, lambda panel, row, colour: _draw_line(panel, row, evidence, colour))


def kept_spectra(report: ReportLike, label: str) -> Figure | None:
    """Draw which part of the weights' spectra a plan starts from.

    Up to six layers, the whole spectra as lines with dots at what is kept. Above, lines would hide each other:
    a strip for each layer over the places in its spectrum, thick where they are kept.

    Args:
        report: The report.
        label: The method; its evidence has ``spectrum`` (all singular values) and ``singular_values`` (those kept).

    Returns:
        The figure; None when a target lacks one of the two, or what is kept is not part of the spectrum.

    Raises:
        ArtefactError: The report is malformed.
    """
    rows = plan_of(as_report(report), label)
    places = {row.target: kept_places(row.evidence.get(_ALL, ()), row.evidence.get(_KEPT, ())) for row in rows}
    if not rows or any(found is None for found in places.values()):
        return None
    if len({row.layer for row in rows}) > _MOST_LINES:
        strips = _Axes("index of the singular value (thick: kept)", "layer", _frame_layers, keyed=False)
        return _panels(rows, strips, lambda axes, row, colour: _draw_strip(axes, row, places[row.target] or [], colour))

    def draw(axes: Axes, row: PlanRow, colour: Any) -> None:
        _draw_line(axes, row, _ALL, colour, lw=0.8, alpha=0.55)
        found = places[row.target] or []
        values = [row.evidence[_ALL][place] for place in found]
        axes.scatter(found, values, s=9, color=colour, linewidths=0, zorder=3)

    return _panels(rows, _Axes("index", "singular values (dots: kept)", _frame_values, keyed=True), draw)


def kept_places(spectrum: Sequence[float], kept: Sequence[float]) -> list[int] | None:
    """Find where in a spectrum the kept values stand.

    Args:
        spectrum: ``(k,)``, all values.
        kept: ``(r,)``, some of them, in any order.

    Returns:
        ``(r,)``, the index of each kept value in the spectrum, no index twice; None where there are no values, or
        one is not in the spectrum (to a thousandth of itself and a millionth of the largest).
    """
    rest = numpy.array(spectrum, dtype=float)
    if not len(kept) or len(kept) > rest.size or not numpy.isfinite(rest).any():
        return None
    top = float(numpy.nanmax(rest))
    places = []
    for value in kept:
        distance = numpy.abs(rest - value)
        if numpy.isnan(distance).all():
            return None
        place = int(numpy.nanargmin(distance))
        if not distance[place] <= 1e-3 * abs(value) + 1e-6 * top:
            return None
        places.append(place)
        rest[place] = math.nan
    return places


@dataclass(frozen=True)
class _Axes:
    """The axes of the panels of a figure: their labels, how they look, and whether colours need a key."""

    across: str
    up: str
    frame: Callable[[Axes], None]
    keyed: bool


def _panels(rows: Sequence[PlanRow], axes: _Axes, draw: Callable[[Axes, PlanRow, Any], None]) -> Figure | None:
    """Draw a panel for each role, at most eight, with something for each of its layers.

    Args:
        rows: The rows of the plan.
        axes: The axes.
        draw: Draws a row into its panel, in a colour.

    Returns:
        The figure; None without rows.
    """
    roles = list(dict.fromkeys(row.role for row in rows))[:8]
    if not rows:
        return None
    layers = [row.layer for row in rows if row.layer is not None]
    shades = _depth_colours()
    depth = Normalize(min(layers, default=0), max(max(layers, default=1), min(layers, default=0) + 1))
    wide = min(len(roles), 4)
    deep = math.ceil(len(roles) / wide)
    with themed():
        figure = page(max(1.65 * wide + 0.7, 3.4), 1.65 * deep + 0.5)
        grid = figure.subplots(deep, wide, sharex=True, sharey=True, squeeze=False)
        for index, panel in enumerate(grid.flat):
            if index >= len(roles):
                panel.set_visible(False)
                continue
            # Shared axes hide tick labels above an empty last panel; this row is the lowest there.
            panel.tick_params(labelbottom=index + wide >= len(roles))
            for row in rows:
                if row.role == roles[index]:
                    draw(panel, row, shades(depth(row.layer or 0)))
            axes.frame(panel)
            panel.set_title(short(roles[index], 18), fontsize=9.5)
        figure.supxlabel(axes.across, fontsize=9.5, color=MUTED)
        figure.supylabel(axes.up, fontsize=9.5, color=MUTED)
        if len(set(layers)) > 1 and axes.keyed:
            _depth_bar(figure, grid.ravel().tolist(), shades, depth, sorted(set(layers)))
        return finish(figure)


def _depth_colours() -> LinearSegmentedColormap:
    """Make the colours of depth, without the yellow that vanishes on white.

    Returns:
        The colour map, dark for the first layers.
    """
    return LinearSegmentedColormap.from_list("depth", colormaps["viridis"](numpy.linspace(0.0, 0.88, 64)))


def _draw_line(axes: Axes, row: PlanRow, evidence: str, colour: Any, lw: float = 1.1, alpha: float = 0.9) -> None:
    """Draw one spectrum.

    Args:
        axes: The panel.
        row: The row of the plan.
        evidence: Which spectrum.
        colour: The colour.
        lw: The width of the line.
        alpha: Its strength.
    """
    values = numpy.array(row.evidence.get(evidence, ()), dtype=float)
    if values.size < 2:
        return
    places = _few(range(values.size))
    shown = numpy.where(values[places] > 0, values[places], math.nan)
    axes.plot(places, shown, color=colour, lw=lw, alpha=alpha)


def _draw_strip(axes: Axes, row: PlanRow, places: Sequence[int], colour: Any) -> None:
    """Draw where the kept values of a layer stand in its spectrum.

    Args:
        axes: The panel.
        row: The row of the plan.
        places: The kept places.
        colour: The colour.
    """
    layer = row.layer or 0
    axes.hlines(layer, 0, len(row.evidence[_ALL]) - 1, color=RULE, lw=0.8, zorder=1)
    chosen = sorted(places)
    first = [place for place in chosen if place - 1 not in places]
    last = [place for place in chosen if place + 1 not in places]
    starts, stops = [place - 0.5 for place in first], [place + 0.5 for place in last]
    axes.hlines([layer] * len(starts), starts, stops, color=colour, lw=3, zorder=2)


def _few(places: Sequence[int]) -> list[int]:
    """Keep at most 120 places, the first and the last among them.

    Args:
        places: The places, ascending.

    Returns:
        Some of them.
    """
    size = len(places)
    chosen = numpy.unique(numpy.linspace(0, size - 1, min(size, 120)).round().astype(int)) if size else ()
    return [places[index] for index in chosen]


def _frame_layers(axes: Axes) -> None:
    """Give a panel of strips its axes.

    Args:
        axes: The panel.
    """
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(visible=True)
    bare(axes)


def _frame_values(axes: Axes) -> None:
    """Give a panel of values, which may be many decades apart, its axes.

    Args:
        axes: The panel.
    """
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.grid(visible=True)
    bare(axes)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)  # a panel of less than two decades needs more ticks
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    # The usual log labels are mathematics, which the theme turns off.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _depth_bar(figure: Figure, panels: list[Axes], shades: Colormap, depth: Normalize, layers: Sequence[int]) -> None:
    """Draw the key of depth.

    Args:
        figure: The figure.
        panels: The panels it belongs to.
        shades: The colours of depth.
        depth: The scale of depth.
        layers: The layers.
    """
    bar = figure.colorbar(ScalarMappable(depth, shades), ax=panels, aspect=30, pad=0.02, shrink=0.9)
    bar.set_ticks([layers[0], layers[-1]])
    bar.set_label("layer", labelpad=-6)
    bar.outline.set_visible(False)
