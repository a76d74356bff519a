"""Charts of sweeps: scores by point, layer (L2-LoRA Fig. 4) or μ of a repair; benefits of a grid (LaLoRA Fig. 4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
import plotly.graph_objects as go

from keeptune.core.intervals import Estimate, combine, lower_is_better, mean_of_seeds
from keeptune.report.numbers import axis_value, signed, unit_words
from keeptune.report.pages.charts import Chart, arms, axis, categories, figure_of, heat_map, map_chart, mark, scatter
from keeptune.report.tables.analyses import benefit_title

_SUMMARIES: Final = {"K": "kept (K)", "T": "learned (T)", "KT": "both (KT)"}
_WORDS: Final = {"knowledge": "keep", "task": "learn"}
_INTERVALS: Final = "bars: 95% intervals"
Rows = Sequence[Mapping[str, Any]]
Means = Mapping[float, Estimate]


class _Panel:
    """Lines along one axis, each with its levels across the plot."""

    def __init__(self, title: str, mode: str = "lines+markers") -> None:
        self.title, self.mode = title, mode
        self.traces: list[go.Scatter] = []
        self.rules: list[tuple[float, str, str]] = []

    def add(self, label: str, means: Means, levels: Sequence[float] = (), before: float | None = None) -> None:
        """Adds a quantity: its means at the places, its levels without a place, and its value before training."""
        if not means:
            return
        drawn = mark(len({trace.legendgroup for trace in self.traces}))
        dots = [(x, value) for x, mean in means.items() for value in mean.values]
        if dots:
            marker = {"size": 4, "opacity": 0.6, "symbol": "circle"}
            more: dict[str, Any] = {"marker": marker, "showlegend": False, "hoverinfo": "skip"}
            self.traces.append(scatter(label, [x for x, _ in dots], [y for _, y in dots], drawn, "markers", **more))
        ys = [mean.mean for mean in means.values()]
        bars = arms(ys, [(mean.low, mean.high) for mean in means.values()], drawn.colour)
        self.traces.append(scatter(label, list(means), ys, drawn, self.mode, error_y=bars))
        self.rules += [(level, drawn.colour, "dash") for level in levels]
        self.rules += [] if before is None else [(before, drawn.colour, "dot")]

    def chart(self, name: str, across: Mapping[str, Any], up: str = "") -> Chart:
        """Returns the panel as a chart."""
        figure = figure_of(self.traces, across, axis(up))
        for level, colour, dash in self.rules:
            figure.add_hline(level, line={"color": colour, "dash": dash, "width": 1})
        return Chart(name, self.title, figure, 300)


def sweep_charts(sweep: Mapping[str, Any]) -> list[Chart]:
    """Returns K, T and KT at the points of a sweep, and the scores of each benchmark by unit; empty without a number.

    The axis is numeric where every point but full fine-tuning, the baseline and a study's layers together has an ``x``;
    these are then dashed levels. Markers are means over seeds, small dots the seeds, bars 95% intervals
    (:mod:`keeptune.core.intervals`).
    ``sweep`` is as in ``runs.json``: ``rows`` and ``axis``, perhaps ``baseline``; ``when`` says what the scores were
    taken after, where that is not training.
    """
    rows, when = sweep["rows"], sweep.get("when", "after training")
    places, levels, across = _axis(sweep)
    mode = "lines+markers" if levels is not None else "markers"  # nothing lies between categories

    def add(panel: _Panel, label: str, means: Mapping[str, Estimate | None], before: float | None = None) -> None:
        known = {name: mean for name, mean in means.items() if mean is not None}
        flat = [known[name].mean for name in levels or () if name in known]
        panel.add(label, {x: known[name] for name, x in places.items() if name in known}, flat, before)

    panels = [_Panel("", mode), _Panel(f"accuracy {when}", mode), _Panel(f"cross entropy {when}, nats/token", mode)]
    for key in _SUMMARIES:
        values = {
            name: [float(row[key]) for row in rows if row["name"] == name and row[key] is not None]
            for name in places | dict.fromkeys(levels or (), 0.0)
        }
        add(panels[0], key, {name: mean_of_seeds(own) for name, own in values.items()})
    panels[0].title = ", ".join(_SUMMARIES[trace.legendgroup] for trace in panels[0].traces if trace.showlegend is None)
    for name in dict.fromkeys(item["name"] for row in rows for item in row["benchmarks"]):
        triples: dict[str, list[tuple[float, float, float]]] = {}
        items = [(row["name"], item) for row in rows for item in row["benchmarks"] if item["name"] == name]
        for point, item in items:
            low, high = (math.nan if end is None else item["before"] + end for end in item["interval"] or (None, None))
            after = math.nan if item["after"] is None else float(item["after"])
            triples.setdefault(point, []).append((after, low, high))
        kind = items[0][1]
        means = {point: combine(own) for point, own in triples.items()}
        panel = panels[1 + lower_is_better(kind["metric"])]
        add(panel, f"{name} ({_WORDS[kind['role']]})", means, float(kind["before"]))
    return [panel.chart(f"sweep{i}", across) for i, panel in enumerate(panels) if panel.traces]


def _axis(sweep: Mapping[str, Any]) -> tuple[dict[str, float], list[str] | None, dict[str, Any]]:
    """Returns the points with their places, those without (None for categories), and the axis."""
    first = {row["name"]: row for row in reversed(sweep["rows"])}
    names = list(dict.fromkeys(row["name"] for row in sweep["rows"]))
    placed = [name for name in names if first[name]["x"] is not None]
    others = [name for name in names if first[name]["x"] is None]
    levels = {name for name in others if first[name]["method"] == "full" or name == sweep.get("baseline")}
    if not placed or ("study" not in sweep and len(levels) < len(others)):
        return {name: float(index) for index, name in enumerate(names)}, None, axis("", **categories(names))
    places = {name: float(first[name]["x"]) for name in sorted(placed, key=lambda name: float(first[name]["x"]))}
    low, high = min(places.values()), max(places.values())
    dashed = f" (dashed: {', '.join(others)})" if others else ""
    ticks = {"tickvals": list(places.values()), "ticktext": [f"{x:g}" for x in places.values()]}
    log = {"type": "log"} if low > 0 and high >= 16 * low else {}
    return places, others, axis(f"{sweep.get('axis') or 'x'}{dashed}", **ticks, **log)


def sweep_note(sweep: Mapping[str, Any]) -> str:
    """Returns what the marks of a sweep's charts are."""
    seeds = "markers: means over seeds; dots: seeds; " if len({row["seed"] for row in sweep["rows"]}) > 1 else ""
    return f"{seeds}{_INTERVALS}; dotted: the base model"


def repair_charts(record: Mapping[str, Any]) -> list[Chart]:
    """Returns the scores at each μ of a repair's sweep in ``repair.json``; empty without a sweep or without scores."""
    if not record.get("sweep") or "scores" not in record:
        return []
    rows = [_repaired(record["scores"], f"mu {entry['mu']:g}", entry["mu"]) for entry in record["sweep"]]
    adapter = _repaired(record["scores"], "adapter", None)
    rows = [*rows, adapter] if all(row["x"] > 0 for row in rows) else rows
    return sweep_charts({"rows": rows, "axis": "mu", "baseline": "adapter", "when": "after repair"})


def _repaired(scores: Rows, label: str, x: float | None) -> dict[str, Any]:
    benchmarks = []
    for row in scores:
        own = next(entry for entry in row["models"] if entry["label"] == label)
        item = {"before": row["base"], "after": own["score"], "interval": own["interval"]}
        benchmarks.append({key: row[key] for key in ("name", "role", "metric")} | item)
    point = {"name": label, "x": x, "seed": 0, "method": "repair", "benchmarks": benchmarks}
    return point | dict.fromkeys(_SUMMARIES)


def benefit_charts(record: Mapping[str, Any]) -> list[Chart]:
    """Returns a map for each benchmark of a grid of two axes in ``runs.json``, with means; empty without a number."""
    tables = [(table, _numbers(table)) for table in record["benefit"]]
    tables = [(table, numbers) for table, numbers in tables if numpy.isfinite(numbers).any()]
    down, across = ((axis["key"], [*map(axis_value, axis["values"]), "mean"]) for axis in record["grid"]["axes"])
    seeds = len({row["seed"] for row in record["rows"]})
    over = (
        f"over {record.get('baseline') or 'the base model'}, {f'means of {seeds} seeds' if seeds > 1 else 'one seed'}"
    )
    charts = []
    for place, (table, numbers) in enumerate(tables):
        same = [abs(own) for other, own in tables if other["unit"] == table["unit"]]
        top = max(float(numpy.nanmax(own)) for own in same) or 1.0
        write = functools.partial(signed, decimals=3 if table["unit"] == "nats" else 1)
        figure = heat_map(numbers, (down, across), "gain", table["unit"], write, (-top, top))
        line = {"color": "var(--paper)", "width": 5}
        figure.add_hline(len(numbers) - 1.5, line=line).add_vline(len(numbers[0]) - 1.5, line=line)
        words = f"{benefit_title(table)}: {unit_words(table['unit'])} {over}; more is better"
        charts.append(map_chart(f"benefit{place}", words, figure, 30))
    return charts


def _numbers(table: Mapping[str, Any]) -> numpy.ndarray:
    lines = [
        [*(None if cell is None else cell["mean"] for cell in line), mean]
        for line, mean in zip(table["cells"], table["rows"], strict=True)
    ]
    return numpy.array([*lines, [*table["columns"], table["mean"]]], dtype=float)
