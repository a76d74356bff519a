"""The figure of what was lost on each relation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from keeptune.core.intervals import combine
from keeptune.report.heat import cells, short, wrapped
from keeptune.report.records import Report, ReportLike, as_report
from keeptune.report.style import diverging, finish, page, themed
from keeptune.report.summary import Series, methods, series
from keeptune.report.wording import signed

__all__ = ["forgetting_by_relation", "relation_losses"]


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
            losses = relation_losses(parsed, kind)
            if losses:
                return _relation_figure(parsed, kind, losses, limit)
    return None


def relation_losses(report: Report, kind: Series) -> dict[str, tuple[int, list[float]]]:
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
        decimals = 3 if kind.lower_is_better else 0
        cells(axes, table, diverging(), norm, lambda value: signed(value, decimals).lstrip("+"))
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
