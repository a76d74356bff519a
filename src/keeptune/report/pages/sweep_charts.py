"""Charts of sweeps: scores by point, layer (L2-LoRA Fig. 4) or μ of a repair; benefits of a grid (LaLoRA Fig. 4)."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
import plotly.graph_objects as go

from keeptune.core.intervals import Triple, combine, lower_is_better
from keeptune.report.numbers import axis_value, signed, unit_words
from keeptune.report.pages.charts import Chart, arms, axis, categories, figure_of, heat_map, map_chart, mark, scatter
from keeptune.report.tables.analyses import benefit_title

_SUMMARIES: Final = {"K": "kept (K)", "T": "learned (T)", "KT": "both (KT)"}
_WORDS: Final = {"knowledge": "keep", "task": "learn"}
Rows = Sequence[Mapping[str, Any]]


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
    lines = [(0, key, None, [(row["name"], (row[key], math.nan, math.nan)) for row in rows]) for key in _SUMMARIES]
    for name in dict.fromkeys(item["name"] for row in rows for item in row["benchmarks"]):
        items = [(row["name"], item) for row in rows for item in row["benchmarks"] if item["name"] == name]
        values = []
        for point, item in items:
            ends = (math.nan if end is None else item["before"] + end for end in item["interval"] or (None, None))
            values.append((point, (item["after"], *ends)))
        kind = items[0][1]
        panel = 1 + lower_is_better(kind["metric"])
        lines.append((panel, f"{name} ({_WORDS[kind['role']]})", kind["before"], values))
    traces: list[list[go.Scatter]] = [[], [], []]
    rules: list[list[tuple[float, str, str]]] = [[], [], []]
    for panel, label, before, values in lines:
        seeds: dict[str, list[Triple]] = {}
        for point, triple in values:
            if triple[0] is not None:
                seeds.setdefault(point, []).append(triple)
        means = {point: mean for point, own in seeds.items() if (mean := combine(own)) is not None}
        known = {x: means[name] for name, x in places.items() if name in means}
        if not known:
            continue
        drawn = mark(len({trace.legendgroup for trace in traces[panel]}))
        xs, dots = zip(*[(x, value) for x, mean in known.items() for value in mean.values], strict=True)
        small = {"size": 4, "opacity": 0.6, "symbol": "circle"}
        more: dict[str, Any] = {"marker": small, "showlegend": False, "hoverinfo": "skip"}
        ys = [mean.mean for mean in known.values()]
        bars = arms(ys, [(mean.low, mean.high) for mean in known.values()], drawn.colour)
        traces[panel].append(scatter(label, xs, dots, drawn, "markers", **more))
        traces[panel].append(scatter(label, list(known), ys, drawn, mode, error_y=bars))
        rules[panel] += [(means[name].mean, drawn.colour, "dash") for name in levels or () if name in means]
        rules[panel] += [] if before is None else [(before, drawn.colour, "dot")]
    shown = {trace.legendgroup for trace in traces[0]}
    titles = (", ".join(words for key, words in _SUMMARIES.items() if key in shown), f"accuracy {when}")
    charts = []
    for index, title in enumerate((*titles, f"cross entropy {when}, nats/token")):
        figure = figure_of(traces[index], across, axis(""))
        for level, colour, dash in rules[index]:
            figure.add_hline(level, line={"color": colour, "dash": dash, "width": 1})
        charts += [Chart(f"sweep{index}", title, figure, 300)] if traces[index] else []
    return charts


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
    return f"{seeds}bars: 95% intervals; dotted: the base model"


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
