"""The tables of a run's page: benchmarks with bars, options, and divergence from the base."""

import math
from collections.abc import Mapping
from typing import Any

from keeptune.core.intervals import mean_of_seeds
from keeptune.report.estimates import Series, methods, series
from keeptune.report.grids import Cell, Grid, bar
from keeptune.report.numbers import change_text, interval_text, number, option_text
from keeptune.report.records import Report
from keeptune.report.tables.comparison_table import comparison_rows


def benchmark_tables(report: Report) -> list[tuple[Series, int, Grid]]:
    """Returns the benchmarks before and after, with the number of items; bars of one role and unit share a scale."""
    rows = comparison_rows(report)
    kinds = [kind for role in ("knowledge", "task") for kind in series(report, role)]
    own = {
        kind.name: [(i, row[kind.role][kind.name]) for i, row in enumerate(rows) if kind.name in row[kind.role]]
        for kind in kinds
    }
    reach: dict[tuple[str, bool], float] = {}
    for kind in kinds:
        sizes = [abs(numbers[key]) for _, numbers in own[kind.name] for key in ("change", "low", "high")]
        unit = kind.role, kind.lower_is_better
        reach[unit] = max([reach.get(unit, 0.0), *filter(math.isfinite, sizes)])
    tables = []
    for kind in kinds:
        scale = reach[kind.role, kind.lower_is_better] or 1.0
        entries = tuple(_entry(str(rows[i]["method"]), i, numbers, kind, scale) for i, numbers in own[kind.name])
        if entries:
            n = max(numbers["n"] for _, numbers in own[kind.name])
            tables.append((kind, n, Grid(("method", "before → after", "change"), entries)))
    return tables


def _entry(label: str, index: int, numbers: Mapping[str, Any], kind: Series, scale: float) -> tuple[str | Cell, ...]:
    change, low, high = (float(numbers[key]) for key in ("change", "low", "high"))
    nats = kind.lower_is_better
    text = change_text(change, nats)
    better = (-change, -high, -low) if nats else (change, low, high)
    strip = bar(*better, scale, f"{label} on {kind.name}: {text}")
    scores = f"{number(numbers['before'])} → {number(numbers['after'])}"
    return Cell(label, index=index), scores, Cell(text, interval_text(low, high, nats), bar=strip, kind="bar")


def options(report: Report) -> tuple[str, Grid | None]:
    """Returns what all methods have in common, as text (empty for one method), and each method's other options.

    None where there are no others.
    """
    known = methods(report)
    each = []
    for method in known:
        keys = dict.fromkeys(key for run in method.runs for key in run.options)
        values = {key: dict.fromkeys(option_text(run.options.get(key)) for run in method.runs) for key in keys}
        each.append([f"{key.replace('_', ' ')} {', '.join(texts)}" for key, texts in values.items()])
    same = [text for text in each[0] if all(text in own for own in each)] if len(each) > 1 else []
    rows = [(m.label, "; ".join(t for t in own if t not in same)) for m, own in zip(known, each, strict=True)]
    grid = Grid(("method", "options"), tuple((label, Cell(own or "–", kind="path")) for label, own in rows))
    return ", ".join(same), grid if any(own for _, own in rows) else None


def divergence(report: Report) -> Grid | None:
    """Returns the divergence from the base model, a row for each method; None when it was not measured."""
    names = list(dict.fromkeys(item.name for run in report.runs for item in run.benchmarks if item.kl is not None))
    rows = []
    for method in methods(report):
        measured = [{item.name: item.kl for item in run.benchmarks if item.kl is not None} for run in method.runs]
        means = [mean_of_seeds([own[name] for own in measured if name in own]) for name in names]
        rows.append((method.label, *(number(mean.mean if mean else None) for mean in means)))
    return Grid(("method", *names), tuple(rows)) if names else None
