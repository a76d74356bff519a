"""The figures of a sequence's page: the matrix stage x benchmark, and the scores over the stages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from keeptune.core.intervals import lower_is_better
from keeptune.report.numbers import number
from keeptune.report.pages import charts

Record = Mapping[str, Any]


def row_names(record: Record) -> list[str]:
    """Returns the names of the rows of the matrix: the base, and the model after each stage."""
    return ["base", *(f"after {stage['name']}" for stage in record["stages"])]


def split(record: Record) -> list[tuple[str, list[int]]]:
    """Returns the units, which have no scale in common, with the benchmarks (columns) of each."""
    nats = [i for i, b in enumerate(record["benchmarks"]) if lower_is_better(b["metric"])]
    shares = [i for i in range(len(record["benchmarks"])) if i not in nats]
    return [(unit, columns) for unit, columns in (("accuracy", shares), ("nats/token", nats)) if columns]


def score_table(record: Record, columns: Sequence[int]) -> list[list[float]]:
    """Returns the scores of some benchmarks, a row for the base and each stage, NaN where there is none."""
    return [[math.nan if row[i] is None else float(row[i]) for i in columns] for row in record["scores"]]


def own_stage(record: Record, column: int) -> int | None:
    """Returns the row after the stage that taught a benchmark's task; None for other benchmarks."""
    stage = record["benchmarks"][column]["stage"]
    return None if stage is None else 1 + [one["name"] for one in record["stages"]].index(stage)


def matrices(record: Record) -> list[charts.Chart]:
    """Returns the matrix stage x benchmark, a map for each unit; a frame marks a task's own stage."""
    panels = []
    for place, (unit, columns) in enumerate(split(record)):
        table = score_table(record, columns)
        accuracy = unit == "accuracy"
        axes = ("", row_names(record)), ("benchmark", [record["benchmarks"][i]["name"] for i in columns])
        scale, span = ("cool", (0.0, 1.0)) if accuracy else ("warm", None)
        figure = charts.heat_map(table, axes, scale, unit, number, span)
        figure.update_xaxes(side="top", title={"text": ""})
        for x, y in ((x, own_stage(record, column)) for x, column in enumerate(columns)):
            if y is not None:
                corners = {"x0": x - 0.49, "x1": x + 0.49, "y0": y - 0.48, "y1": y + 0.48}
                figure.add_shape(type="rect", **corners, line={"color": "var(--ink)", "width": 2.5})
        words = f"Scores after each stage, {unit}" + ("" if accuracy else ", lower is better")
        panels.append(charts.map_chart(f"matrix{place}", words, figure, 38))
    return panels


def lines(record: Record) -> list[charts.Chart]:
    """Returns the scores of each benchmark over the stages, with the intervals of their change from the base."""
    panels = []
    for place, (unit, columns) in enumerate(split(record)):
        traces = [_line(record, column, index) for index, column in enumerate(columns)]
        up = charts.axis(unit, **({"rangemode": "tozero"} if unit == "accuracy" else {}))
        figure = charts.figure_of(traces, _stage_axis(row_names(record)), up, margin={"r": 36})
        labels = tuple(record["benchmarks"][i]["name"] for i in columns)
        panels.append(charts.Chart(f"lines{place}", f"Scores over the stages, {unit}", figure, 400, labels))
    return panels


def _stage_axis(names: Sequence[str]) -> dict[str, Any]:
    return {**charts.categories(names), "range": [-0.3, len(names) - 0.7], "ticklabeloverflow": "allow"}


def _line(record: Record, column: int, index: int) -> go.Scatter:
    benchmark, drawn = record["benchmarks"][column], charts.mark(index)
    scores = [row[0] for row in score_table(record, [column])]
    tips, hovers = [], []
    for row, (name, score) in enumerate(zip(row_names(record), scores, strict=True)):
        low, high = (scores[0] + end for end in record["intervals"][row][column] or (math.nan, math.nan))
        tips.append((low, high))
        rows: list[tuple[str, object]] = [("score", number(score))]
        rows.append(("interval", None if math.isnan(low) else f"{number(low)} to {number(high)}"))
        if row > 0:
            stage = record["stages"][row - 1]
            rows += [("method", stage["method"]), ("seed", stage["seed"]), *stage["options"].items()]
        hovers.append(charts.hover(f"{benchmark['name']}, {name}", rows))
    own = own_stage(record, column)
    marker = {"size": [15 if row == own else 8 for row in range(len(scores))]}
    bars = charts.arms(scores, tips, drawn.colour)
    return charts.scatter(
        benchmark["name"], range(len(scores)), scores, drawn, hovertext=hovers, marker=marker, error_y=bars
    )


def course(record: Record) -> charts.Chart | None:
    """Returns average accuracy and forgetting over the tasks seen so far; None for fewer than two stages."""
    steps, names, traces = record["course"], row_names(record)[1:], []
    if len(steps) < 2:
        return None
    for index, key in enumerate(("average_accuracy", "forgetting")):
        words, values = key.replace("_", " "), [step[key] for step in steps]
        hovers = [charts.hover(name, [(words, number(value))]) for name, value in zip(names, values, strict=True)]
        more: dict[str, Any] = {"hovertext": hovers, "marker": {"size": 9}}
        traces.append(charts.scatter(words, range(len(steps)), values, charts.mark(index), **more))
    figure = charts.figure_of(traces, _stage_axis(names), charts.axis("share"), margin={"r": 36})
    return charts.Chart("course", "Average accuracy and forgetting over the tasks seen so far", figure, 340)


def losses(record: Record) -> charts.Chart | None:
    """Returns the training loss of every stage; None without losses."""
    traces = []
    for index, stage in enumerate(record["stages"]):
        curve = [(float(row["step"]), float(row.get("nll", row["loss"]))) for row in stage["loss"]]
        if len(curve) > 1:
            traces.append(charts.scatter(stage["name"], *charts.thin(curve), charts.mark(index), "lines"))
    if not traces:
        return None
    up = charts.axis("training loss (nats/token)", rangemode="tozero")
    figure = charts.figure_of(traces, charts.axis("training step of the stage"), up)
    labels = tuple(trace.legendgroup for trace in traces)
    return charts.Chart("losses", "Training loss of each stage", figure, 380, labels, "")
