"""The figures of a sequence's page: the matrix stage x benchmark, and the scores over the stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.report.charts import Chart, axis, errors, heat_map, hover, mark, plain
from keeptune.report.plots import thin
from keeptune.report.wording import number

__all__ = ["course", "lines", "losses", "matrices", "row_names", "split"]

Record = Mapping[str, Any]
_BASE = "base"


def row_names(record: Record) -> list[str]:
    """Name the rows of the matrix.

    Args:
        record: As in ``sequence.json``.

    Returns:
        The base, then every stage.
    """
    return [_BASE, *(f"after {stage['name']}" for stage in record["stages"])]


def split(record: Record) -> list[tuple[str, list[int]]]:
    """Part the benchmarks by unit, which have no scale in common.

    Args:
        record: As in ``sequence.json``.

    Returns:
        Unit and columns, for units that are there.
    """
    nats = [i for i, b in enumerate(record["benchmarks"]) if b["metric"] == "cross_entropy"]
    shares = [i for i in range(len(record["benchmarks"])) if i not in nats]
    return [(unit, columns) for unit, columns in (("accuracy", shares), ("nats/token", nats)) if columns]


def matrices(record: Record) -> list[Chart]:
    """Draw the matrix stage x benchmark, a map for each unit; a frame marks a task's own stage.

    Args:
        record: As in ``sequence.json``.

    Returns:
        The figures.
    """
    found = []
    for place, (unit, columns) in enumerate(split(record)):
        table = [[_number(row[i]) for i in columns] for row in record["scores"]]
        names = [record["benchmarks"][i]["name"] for i in columns]
        accuracy = unit == "accuracy"
        figure = heat_map(
            *(table, row_names(record), names),
            scale="cool" if accuracy else "warm",
            across="benchmark",
            down="",
            said=unit,
            texts=[[number(value) for value in row] for row in table],
            span=(0.0, 1.0) if accuracy else None,
        )
        figure["layout"]["xaxis"] |= {"side": "top", "title": {"text": ""}}
        figure["layout"]["shapes"] = _frames(record, columns)
        words = f"Scores after each stage, {unit}" + ("" if accuracy else ", lower is better")
        found.append(Chart(f"matrix{place}", words, words, figure, max(110 + 38 * len(table), 270)))
    return found


def _frames(record: Record, columns: Sequence[int]) -> list[dict[str, Any]]:
    stages = [stage["name"] for stage in record["stages"]]
    frames = []
    for x, column in enumerate(columns):
        stage = record["benchmarks"][column].get("stage")
        if stage in stages:
            y = 1 + stages.index(stage)
            corners = {"x0": x - 0.49, "x1": x + 0.49, "y0": y - 0.48, "y1": y + 0.48}
            frames.append({"type": "rect", **corners, "line": {"color": "--ink", "width": 2.5}})
    return frames


def lines(record: Record) -> list[Chart]:
    """Draw the scores of each benchmark over the stages, with the intervals of their change from the base.

    Args:
        record: As in ``sequence.json``.

    Returns:
        A figure for each unit.
    """
    found = []
    for place, (unit, columns) in enumerate(split(record)):
        traces = [_line(record, column, index) for index, column in enumerate(columns)]
        names = row_names(record)
        ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [plain(name) for name in names]}
        layout = {
            "xaxis": {**ticks, "range": [-0.3, len(names) - 0.7], "ticklabeloverflow": "allow"},
            "margin": {"r": 36},
            "yaxis": axis(unit, **({"rangemode": "tozero"} if unit == "accuracy" else {})),
            "hovermode": "closest",
        }
        words = f"Scores over the stages, {unit}"
        labels = tuple(record["benchmarks"][i]["name"] for i in columns)
        found.append(Chart(f"lines{place}", words, words, {"data": traces, "layout": layout}, 400, labels))
    return found


def _line(record: Record, column: int, index: int) -> dict[str, Any]:
    benchmark, look = record["benchmarks"][column], mark(index)
    scores = [_number(row[column]) for row in record["scores"]]
    arms, told = [], []
    for row, score in enumerate(scores):
        ends = (record.get("intervals") or [])[row][column] if record.get("intervals") else None
        low, high = (math.nan, math.nan) if ends is None else (scores[0] + ends[0], scores[0] + ends[1])
        arms.append(errors(score, low, high))
        rows = [("score", number(score)), ("interval", None if ends is None else f"{number(low)} to {number(high)}")]
        told.append(hover(f"{benchmark['name']}, {row_names(record)[row]}", [*rows, *_about(record, row)]))
    stages = [stage["name"] for stage in record["stages"]]
    own = 1 + stages.index(benchmark["stage"]) if benchmark.get("stage") in stages else -1
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(benchmark["name"]),
        "legendgroup": str(benchmark["name"]),
        "x": list(range(len(scores))),
        "y": scores,
        "error_y": {
            "type": "data",
            "array": [a for a, _ in arms],
            "arrayminus": [b for _, b in arms],
            "color": look.colour,
            "thickness": 1,
            "width": 3,
        },
        "line": {"color": look.colour, "dash": look.dash, "width": 2},
        "marker": {"symbol": look.symbol, "size": [15 if row == own else 8 for row in range(len(scores))]},
        "hovertext": told,
        "hoverinfo": "text",
    }


def _about(record: Record, row: int) -> list[tuple[str, object]]:
    if row == 0:
        return []
    stage = record["stages"][row - 1]
    options = {key: value for key, value in (stage.get("options") or {}).items() if value is not None}
    return [("method", stage["method"]), ("seed", stage["seed"]), *options.items()]


def course(record: Record) -> Chart | None:
    """Draw average accuracy and forgetting over the tasks seen so far.

    Args:
        record: As in ``sequence.json``.

    Returns:
        The figure; None with fewer than two stages.
    """
    steps = record.get("course") or []
    if len(steps) < 2:
        return None
    names = row_names(record)[1:]
    traces = []
    for index, (key, words) in enumerate((("average_accuracy", "average accuracy"), ("forgetting", "forgetting"))):
        look = mark(index)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": words,
                "x": list(range(len(steps))),
                "y": [step[key] for step in steps],
                "line": {"color": look.colour, "dash": look.dash, "width": 2},
                "marker": {"symbol": look.symbol, "size": 9},
                "hovertext": [hover(name, [(words, number(s[key]))]) for name, s in zip(names, steps, strict=True)],
                "hoverinfo": "text",
            }
        )
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [plain(name) for name in names]}
    across = {**ticks, "range": [-0.3, len(names) - 0.7], "ticklabeloverflow": "allow"}
    layout = {"xaxis": across, "yaxis": axis("share"), "margin": {"r": 36}, "hovermode": "closest"}
    words = "Average accuracy and forgetting over the tasks seen so far"
    return Chart("course", words, words, {"data": traces, "layout": layout}, 340)


def losses(record: Record) -> Chart | None:
    """Draw the training loss of every stage.

    Args:
        record: As in ``sequence.json``.

    Returns:
        The figure; None without losses.
    """
    traces = []
    for index, stage in enumerate(record["stages"]):
        curve = [(float(row["step"]), float(row["loss"])) for row in stage.get("loss") or []]
        if len(curve) > 1:
            steps, values = thin(curve)
            line = {"color": mark(index).colour, "dash": mark(index).dash, "width": 1.8}
            named = {"name": plain(stage["name"]), "legendgroup": str(stage["name"])}
            traces.append({"type": "scatter", "mode": "lines", **named, "x": steps, "y": values, "line": line})
    if not traces:
        return None
    layout = {
        "xaxis": axis("training step of the stage"),
        "yaxis": axis("training loss (nats/token)", rangemode="tozero"),
    }
    labels = tuple(stage["name"] for stage in record["stages"] if len(stage.get("loss") or []) > 1)
    return Chart("losses", "Training loss of each stage", "", {"data": traces, "layout": layout}, 380, labels)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
