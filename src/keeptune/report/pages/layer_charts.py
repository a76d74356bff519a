"""The figures of a run's page by layer: ranks, evidence, spectra, votes, penalties and drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy

from keeptune.report.estimates import methods
from keeptune.report.numbers import gap, listing
from keeptune.report.pages.charts import (
    MANY,
    Chart,
    axis,
    figure_of,
    heat_map,
    layer_map,
    log_map,
    mark,
    plain,
    scatter,
    thin,
)
from keeptune.report.records import PlanRow, Report, Run

_BINS: Final = 64
_STEPS: Final = 120  # of a drift map
_MOST_LAYERS: Final = 6  # of which spectra are drawn
_NUMBERED: Final = 16  # layers up to which cells hold numbers
Read = Callable[[PlanRow], float | None]


def ranks(report: Report) -> list[Chart]:
    """Returns maps of the ranks of methods whose ranks differ, and of every number that a plan has for each target."""
    charts = []
    for place, method in enumerate(methods(report)):
        rows, about = method.plan, f"{method.label} by layer and role"
        if len({row.rank for row in rows}) > 1:
            charts += _map(f"ranks{place}", f"Ranks of {about}", rows, lambda row: row.rank, "rank", "cool")
        charts += _importances(f"importances{place}", f"Importances behind {about}", rows)
        sizes: dict[str, set[int]] = {}
        for row in rows:
            for name, curve in row.evidence.items():
                sizes.setdefault(name, set()).add(curve.size)
        single = [name for name, lengths in sizes.items() if lengths == {1} and name != "importance"]
        for index, name in enumerate(single):
            said = name.replace("_", " ")
            read: Read = lambda row, name=name: next(iter(row.curve(name).values), None)  # type: ignore[misc] # noqa: E731
            charts += _map(f"evidence{place}-{index}", f"{said.capitalize()} of {about}", rows, read, said, "warm")
    return charts


def _placed(rows: Sequence[PlanRow], read: Read) -> tuple[numpy.ndarray, list[str], list[str]] | None:
    """Returns a table of roles by layers, NaN where there is no number, with the names of its rows and columns."""
    cells = [(row.layer, row.role, value) for row in rows if row.layer is not None and (value := read(row)) is not None]
    if not any(math.isfinite(value) for _, _, value in cells):
        return None
    # All layers of the plan, so that maps of one plan stand in line.
    layers = sorted({row.layer for row in rows if row.layer is not None})
    roles = list(dict.fromkeys(role for _, role, _ in cells))
    table = numpy.full((len(roles), len(layers)), math.nan)
    for layer, role, value in cells:
        table[roles.index(role), layers.index(layer)] = value
    return table, roles, [str(layer) for layer in layers]


def _map(name: str, words: str, rows: Sequence[PlanRow], read: Read, said: str, scale: str) -> list[Chart]:
    placed = _placed(rows, read)
    if placed is None:
        return []
    table, roles, layers = placed
    good = table[numpy.isfinite(table)]
    form = ".0f" if (good == good.astype(int)).all() else ".2g"
    texts = [["" if math.isnan(value) else f"{value:{form}}" for value in row] for row in table]
    span = (min(0.0, float(good.min())), float(good.max()))
    shown = texts if len(layers) <= _NUMBERED else None
    figure = heat_map(table.tolist(), ("", roles), ("layer", layers), scale, said, shown, span)
    return [layer_map(name, words, figure, len(roles))]


def _importances(name: str, words: str, rows: Sequence[PlanRow]) -> list[Chart]:
    """Returns a map of importances above zero, coloured by their logarithms."""
    placed = _placed(rows, lambda row: row.importance if (row.importance or 0) > 0 else None)
    if placed is None:
        return []
    table, roles, layers = placed
    figure = log_map(table, ("", roles), ("layer", layers), "warm", "importance", gap)
    return [layer_map(name, words, figure, len(roles))]


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
        names = [str(row.target if row.layer is None else row.layer) for row in rows]
        figure = heat_map(
            table.tolist(), ("layer", names), ("node", columns), "cool", "texts that name the node, mean"
        ).update_traces(zmin=0.0)
        words = f"How many texts name each node, by layer: {method.label}"
        charts.append(layer_map(f"votes{place}", words, figure, len(rows)))
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
    layers = sorted({row.layer for row in rows if row.layer is not None})
    chosen = {layers[i] for i in numpy.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)}
    roles = list(dict.fromkeys(row.role for row in rows))
    traces: list[Any] = []
    for row in rows:
        curve = row.curve(evidence)
        if not any(value > 0 for value in curve.values) or (row.layer is not None and row.layer not in chosen):
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
    """Returns task loss and penalty over the steps, and how far each layer moved, for methods with penalties."""
    shown = [(m.label, m.runs[0]) for m in methods(report) if len(m.runs[0].penalised) > 1][:MANY]
    charts = []
    for place, (label, run) in enumerate(shown):
        charts.append(_costs(f"penalty{place}", label, run))
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


def _drift(key: str, label: str, run: Run) -> list[Chart]:
    layers = sorted({layer for row in run.penalised for layer in row.layers})
    if not layers:
        return []
    rows = run.penalised[:: max(math.ceil(len(run.penalised) / _STEPS), 1)]
    table = [[row.layers.get(layer, math.nan) for row in rows] for layer in layers]
    across = ("training step", [f"{row.step:g}" for row in rows])
    figure = heat_map(table, ("layer", [str(layer) for layer in layers]), across, "warm", "‖ΔW‖ / ‖W‖")
    figure.update_traces(xgap=0, zmin=0.0)
    words = f"Drift of each layer while training, ‖ΔW‖ / ‖W‖: {label}"
    return [layer_map(key, words, figure, len(layers), 22, 26)]
