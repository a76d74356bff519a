"""Figures of relations, ranks and spectra."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from keeptune.report.heat import cells, short, wrapped
from keeptune.report.records import PlanRow, Report, ReportLike, as_report
from keeptune.report.style import MUTED, bare, diverging, finish, page, themed
from keeptune.report.summary import Method, Series, combine, methods, series

__all__ = ["evidence_names", "forgetting_by_relation", "rank_map", "spectra", "uniform_rank"]


def forgetting_by_relation(report: ReportLike, benchmark: str | None = None, limit: int = 25) -> Figure | None:
    """Draw what was lost on each relation as a heat map of relations and methods.

    Args:
        report: The report.
        benchmark: The knowledge benchmark; without it, the first that has groups.
        limit: How many relations at most; those with the largest mean loss are kept.

    Returns:
        The figure; None when the benchmark has no groups.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    for kind in series(parsed, "knowledge"):
        if benchmark in (None, kind.name):
            losses = _relation_losses(parsed, kind)
            if losses:
                return _relation_figure(parsed, kind, losses, limit)
    return None


def _relation_losses(report: Report, kind: Series) -> dict[str, tuple[int, list[float]]]:
    """Average the loss on every relation over the seeds of each method.

    Args:
        report: The report.
        kind: The benchmark.

    Returns:
        For each relation the number of items and a loss for each method (NaN where not measured),
        the relation with the largest mean loss first.
    """
    found = methods(report)
    sizes: dict[str, int] = {}
    entries: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for method in found:
        for run in method.runs:
            for item in run.benchmarks:
                for name, group in item.groups.items() if item.name == kind.name else ():
                    sizes[name] = max(sizes.get(name, 0), group.n)
                    loss = group.after - group.before if kind.lower_is_better else group.before - group.after
                    value = loss if kind.lower_is_better else 100 * loss
                    entries.setdefault((name, method.label), []).append((value, math.nan, math.nan))
    table = {}
    for name, size in sizes.items():
        means = [combine(entries.get((name, method.label), [])) for method in found]
        table[name] = (size, [math.nan if mean is None else mean.mean for mean in means])
    return dict(sorted(table.items(), key=lambda row: (-_mean(row[1][1]), row[0])))


def _mean(values: Sequence[float]) -> float:
    """Average the finite numbers.

    Args:
        values: The numbers.

    Returns:
        Their mean, minus infinity when there is none.
    """
    good = [value for value in values if math.isfinite(value)]
    return math.fsum(good) / len(good) if good else -math.inf


def _relation_figure(report: Report, kind: Series, losses: dict[str, tuple[int, list[float]]], limit: int) -> Figure:
    """Draw the heat map of relations.

    Args:
        report: The report.
        kind: The benchmark.
        losses: Size and losses of every relation, sorted.
        limit: How many relations at most.

    Returns:
        The figure.
    """
    labels = [method.label for method in methods(report)]
    shown = list(losses.items())[:limit]
    table = numpy.array([row[1][1] for row in shown], dtype=float)
    top = max(float(numpy.nanmax(numpy.abs(table), initial=0.0)), 1e-9)
    wide = min(max(0.95 * len(labels), 1.4), 4.6)
    slanted = len(labels) > 5
    heads = [short(label, 24) if slanted else wrapped(label, 12) for label in labels]
    lines = 6.5 if slanted else max(head.count("\n") for head in heads) + 1
    with themed():
        figure = page(wide + 2.4, 0.235 * len(shown) + 0.17 * lines + 0.5)
        axes = figure.subplots()
        norm = TwoSlopeNorm(0.0, -top, top)
        cells(axes, table, diverging(), norm, 3 if kind.lower_is_better else 0)
        axes.set_yticks(range(len(shown)), [f"{short(name)}  (n={row[0]})" for name, row in shown])
        axes.set_xticks(range(len(labels)), heads)
        axes.xaxis.tick_top()
        if slanted:
            axes.tick_params(axis="x", labelrotation=35)
            for tick in axes.get_xticklabels():
                tick.set(ha="left", rotation_mode="anchor")
        unit = "nats/token lost" if kind.lower_is_better else "points lost"
        part = f"{len(shown)} most forgotten of {len(losses)} relations; " if len(shown) < len(losses) else ""
        axes.set_xlabel(f"{part}{unit} on {kind.name},\nmean over seeds", fontsize=9, loc="right")
        return finish(figure)


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
    ranks = {row.rank for row in _plan(as_report(report), label)}
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
    rows = [row for row in _plan(as_report(report), label) if row.layer is not None and row.rank is not None]
    if not rows:
        return None
    layers = sorted({row.layer for row in rows if row.layer is not None})
    roles = list(dict.fromkeys(row.role for row in rows))
    table = numpy.full((len(roles), len(layers)), math.nan)
    for row in rows:
        if row.layer is not None and row.rank is not None:
            table[roles.index(row.role), layers.index(row.layer)] = row.rank
    with themed():
        cell = min(0.55, 5.8 / len(layers))
        figure = page(max(cell * len(layers) + 1.25, 2.6), 0.28 * len(roles) + 0.6)
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("rank", ["#eef4f9", "#7fb2d9", "#0b5c96"])
        most = float(numpy.nanmax(table))
        norm = Normalize(0, most)
        numbered = cell >= (0.3 if most >= 100 else 0.22)
        cells(axes, table, colours, norm, 0 if numbered else None)
        if not numbered:
            bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=12, pad=0.02)
            bar.set_label("rank")
            bar.outline.set_visible(False)
        _layer_ticks(axes, layers, cell)
        axes.set_yticks(range(len(roles)), [short(role, 18) for role in roles])
        axes.set_xlabel("layer")
        return finish(figure)


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


def _plan(report: Report, label: str) -> tuple[PlanRow, ...]:
    """Find the plan of a method.

    Args:
        report: The report.
        label: The method.

    Returns:
        The plan of its first run that has one.
    """
    plans = [run.plan for method in _called(report, label) for run in method.runs if run.plan]
    return plans[0] if plans else ()


def _called(report: Report, label: str) -> list[Method]:
    """Find a method.

    Args:
        report: The report.
        label: Its label.

    Returns:
        The method in a list, an empty list when there is none.
    """
    return [method for method in methods(report) if method.label == label]


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
    rows = _plan(as_report(report), label)
    return list(dict.fromkeys(name for row in rows for name in row.evidence))


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
    rows = [row for row in _plan(as_report(report), label) if any(v > 0 for v in row.evidence.get(evidence, ()))]
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
        for index, axes in enumerate(grid.flat):
            if index >= len(roles):
                axes.set_visible(False)
                continue
            # Shared axes hide tick labels above an empty last panel; this row is the lowest there.
            axes.tick_params(labelbottom=index + wide >= len(roles))
            _spectrum_panel(axes, [row for row in rows if row.role == roles[index]], evidence, shades, depth)
            axes.set_title(short(roles[index], 18), fontsize=9.5)
        figure.supxlabel("index", fontsize=9.5, color=MUTED)
        figure.supylabel(evidence.replace("_", " "), fontsize=9.5, color=MUTED)
        if len(set(layers)) > 1:
            _depth_bar(figure, grid.ravel().tolist(), shades, depth, sorted(set(layers)))
        return finish(figure)


def _depth_colours() -> LinearSegmentedColormap:
    """Make the colours of depth, without the yellow that vanishes on white.

    Returns:
        The colour map, dark for the first layers.
    """
    return LinearSegmentedColormap.from_list("depth", colormaps["viridis"](numpy.linspace(0.0, 0.88, 64)))


def _spectrum_panel(axes: Axes, rows: Sequence[PlanRow], evidence: str, shades: Colormap, depth: Normalize) -> None:
    """Draw the spectra of one role.

    Args:
        axes: The panel.
        rows: The rows of the plan with that role.
        evidence: Which spectra.
        shades: The colours of depth.
        depth: The scale of depth.
    """
    for row in rows:
        values = numpy.array(row.evidence.get(evidence, ()), dtype=float)
        if values.size < 2:
            continue
        places = numpy.unique(numpy.linspace(0, values.size - 1, min(values.size, 120)).round().astype(int))
        shown = numpy.where(values[places] > 0, values[places], math.nan)
        axes.plot(places, shown, color=shades(depth(row.layer or 0)), lw=1.1, alpha=0.9)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)  # a panel of less than two decades needs more ticks
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    # The usual log labels are mathematics, which the theme turns off.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.grid(visible=True)
    bare(axes)


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
