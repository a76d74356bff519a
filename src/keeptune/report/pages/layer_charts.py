"""The figures of a run's page by layer: ranks, evidence, spectra, votes, penalties and drift."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy

from keeptune.report.estimates import methods
from keeptune.report.numbers import gap, listing
from keeptune.report.pages.charts import (
    MANY,
    Chart,
    Placed,
    axis,
    figure_of,
    heat_map,
    map_chart,
    mark,
    plain,
    role_map,
    scatter,
    thin,
)
from keeptune.report.records import PlanRow, Report, Run

_BINS: Final = 64
_STEPS: Final = 120  # of a drift map
_MOST_LAYERS: Final = 6  # of which spectra are drawn


def ranks(report: Report) -> list[Chart]:
    """Returns maps of the ranks of methods whose ranks differ, and of every number that a plan has for each target."""
    charts = []
    for place, method in enumerate(methods(report)):
        rows, about = method.plan, f"{method.label} by layer and role"
        if len({row.rank for row in rows}) > 1:
            cells = [(row.layer, row.role, row.rank) for row in rows]
            charts += role_map(f"ranks{place}", f"Ranks of {about}", cells, "cool", "rank")
        weights: Placed = [(row.layer, row.role, row.importance if (row.importance or 0) > 0 else None) for row in rows]
        words = f"Importances behind {about}"
        charts += role_map(f"importances{place}", words, weights, "warm", "importance", write=gap, least=0.0)
        names = dict.fromkeys(name for row in rows for name in row.evidence if name != "importance")
        for index, name in enumerate(n for n in names if all(row.curve(n).size < 2 for row in rows)):
            said = name.replace("_", " ")
            numbers: Placed = [(row.layer, row.role, next(iter(row.curve(name).values), None)) for row in rows]
            charts += role_map(f"evidence{place}-{index}", f"{said.capitalize()} of {about}", numbers, "warm", said)
    return charts


def votes(report: Report) -> list[Chart]:
    """Returns how many texts named each node, block by block, behind plans that count votes (LoKI)."""
    charts = []
    for place, method in enumerate(methods(report)):
        rows = [row for row in method.plan if row.curve("votes").size > 1]
        curves = [row.curve("votes") for row in rows]
        places = {(curve.at, curve.size) for curve in curves}
        if len(places) != 1:
            continue
        ((at, nodes),) = places
        edges = numpy.linspace(0, nodes, min(nodes, _BINS) + 1).round().astype(int)
        counts = numpy.asarray([curve.values for curve in curves], dtype=float) * numpy.diff([*at, nodes])
        table = numpy.add.reduceat(counts, numpy.searchsorted(at, edges[:-1]), axis=1) / numpy.diff(edges)
        if not table.max() > 0:
            continue
        columns = [f"{a}" if b - a == 1 else f"{a}–{b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
        names = [str(row.layer) for row in rows]
        span, said = (0.0, float(table.max())), "texts that name the node, mean"
        figure = heat_map(table, (("layer", names), ("node", columns)), "cool", said, span=span)
        charts.append(map_chart(f"votes{place}", f"How many texts name each node, by layer: {method.label}", figure))
    return charts


def spectra(report: Report) -> list[Chart]:
    """Returns every kind of spectrum behind a plan once, also when methods share it."""
    users: dict[tuple[str, Any], tuple[tuple[PlanRow, ...], list[str]]] = {}
    for method in methods(report):
        rows = method.plan
        for name in dict.fromkeys(name for row in rows for name, curve in row.evidence.items() if curve.size > 1):
            if name != "votes":
                evidence = tuple(row.curve(name) for row in rows)
                users.setdefault((name, evidence), (rows, []))[1].append(method.label)
    return [
        chart
        for place, ((name, _), (rows, labels)) in enumerate(users.items())
        for chart in _spectrum(f"spectra{place}", name, rows, labels)
    ]


def _spectrum(name: str, evidence: str, rows: Sequence[PlanRow], labels: Sequence[str]) -> list[Chart]:
    """Returns spectra on a logarithmic axis, a line for each target of at most six layers."""
    layers = sorted({row.layer for row in rows if row.layer >= 0})
    chosen = {layers[i] for i in numpy.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)}
    roles = list(dict.fromkeys(row.role for row in rows))
    traces: list[Any] = []
    for row in rows:
        curve = row.curve(evidence)
        if not any(value > 0 for value in curve.values) or (row.layer >= 0 and row.layer not in chosen):
            continue
        xs, ys = thin([(x, y if y > 0 else math.nan) for x, y in zip(curve.at, curve.values, strict=True)])
        first = not any(trace.legendgroup == row.role for trace in traces)
        hovers = f"{plain(row.role)}, layer {row.layer}<br>%{{x}}: %{{y:.3g}}<extra></extra>"
        more = {"showlegend": first, "opacity": 0.8, "line": {"width": 1.3, "dash": "solid"}, "hovertemplate": hovers}
        traces.append(scatter(row.role, xs, ys, mark(roles.index(row.role)), "lines", **more))
    if not traces:
        return []
    said = evidence.replace("_", " ")
    top = [y for trace in traces for y in trace.y if y > 0]
    part = f" ({len(chosen)} of {len(layers)} layers)" if len(chosen) < len(layers) else ""
    figure = figure_of(traces, axis("index"), axis(said, type="log", dtick=1 if max(top) > 100 * min(top) else "D2"))
    words = f"{said.capitalize()}: {listing(labels)}{part}"
    return [Chart(name, words, figure, 380, tuple(roles))]


def penalties(report: Report) -> list[Chart]:
    """Returns the KL to the base or task loss and penalty, and how far each layer moved, of methods with penalties."""
    shown = [(m.label, m.runs[0]) for m in methods(report) if len(m.runs[0].penalised) > 1][:MANY]
    charts = []
    for place, (label, run) in enumerate(shown):
        measured = any(row.kl_to_base is not None for row in run.penalised)
        charts.append((_measured if measured else _costs)(f"penalty{place}", label, run))
        charts += _drift(f"drift{place}", label, run)
    return charts


def _costs(key: str, label: str, run: Run) -> Chart:
    loss = dict(run.loss)
    steps = [row.step for row in run.penalised]
    curves: dict[str, list[float | None]] = {
        "task loss": [loss.get(step) for step in steps],
        "penalty": [row.penalty for row in run.penalised],
    }
    lines = [scatter(name, steps, values, mark(i), "lines") for i, (name, values) in enumerate(curves.items())]
    # The loss falls from far above what a penalty costs: the start is cut off.
    late = [value for values in curves.values() for value in values[len(values) // 5 :] if value is not None]
    top = 1.1 * max([value for value in late if math.isfinite(value)], default=1.0)
    figure = figure_of(lines, axis("training step"), axis("nats", range=[0, top or 1.0]))
    return Chart(key, f"Task loss and penalty: {label}", figure, 330)


def _measured(key: str, label: str, run: Run) -> Chart:
    """Returns what the knowledge texts lose; its gradient is what costs, the penalty has no scale of its own."""
    names = {"kl_to_base": "texts trained on", "kl_held_out": "held-out texts", "kl_budget": "budget"}
    lines = []
    for index, (field, name) in enumerate(names.items()):
        points = [(row.step, value) for row in run.penalised if (value := getattr(row, field)) is not None]
        mode = "markers" if field == "kl_held_out" else "lines+markers" if len(points) < _BINS else "lines"
        lines += [scatter(name, *thin(points), mark(index), mode)] if points else []
    figure = figure_of(lines, axis("training step"), axis("KL to the base, nats per token", rangemode="tozero"))
    return Chart(key, f"What the texts to be kept lose while training: {label}", figure, 330)


def _drift(key: str, label: str, run: Run) -> list[Chart]:
    layers = sorted({layer for row in run.penalised for layer in row.layers})
    if not layers:
        return []
    rows = run.penalised[:: max(math.ceil(len(run.penalised) / _STEPS), 1)]
    table = [[row.layers.get(layer, math.nan) for row in rows] for layer in layers]
    axes = ("layer", [str(layer) for layer in layers]), ("training step", [f"{row.step:g}" for row in rows])
    figure = heat_map(table, axes, "warm", "‖ΔW‖ / ‖W‖").update_traces(xgap=0, zmin=0.0)
    return [map_chart(key, f"Drift of each layer while training, ‖ΔW‖ / ‖W‖: {label}", figure, 22, 26)]
