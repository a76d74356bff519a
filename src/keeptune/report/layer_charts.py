"""The per-layer figures of a run's page: ranks, importances, attribution, causal tracing, penalties and drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy

from keeptune.report.charts import Chart, axis, heat_map, mark, plain
from keeptune.report.layers import plan_of, uniform_rank
from keeptune.report.records import PlanRow, Report, Run
from keeptune.report.style import MANY
from keeptune.report.summary import methods
from keeptune.report.wording import importance

__all__ = ["penalties", "ranks", "traces", "votes"]

_BINS: Final = 64
_LEAST: Final = 270  # pixels below which plotly.js has no room for the key of colours
_STEPS: Final = 120  # of a drift map


def ranks(report: Report) -> list[Chart]:
    """Draw the ranks of methods whose ranks differ, and every number that a plan has for each target.

    Args:
        report: The report.

    Returns:
        Heat maps of roles by layers.
    """
    found = []
    for place, method in enumerate(methods(report)):
        rows = plan_of(report, method.label)
        if uniform_rank(report, method.label) is None:
            words = f"Ranks of {method.label} by layer and role"
            found += _map(f"ranks{place}", words, rows, lambda row: row.rank, "rank", "cool")
        words = f"Importances behind {method.label} by layer and role"
        found += _logarithmic(f"importances{place}", words, rows, lambda row: row.importance, "importance")
        for index, name in enumerate(_single(rows)):
            said = name.replace("_", " ")
            words = f"{said.capitalize()} of {method.label} by layer and role"
            found += _map(f"evidence{place}-{index}", words, rows, _reader(name), said, "warm")
    return found


def _single(rows: Sequence[PlanRow]) -> list[str]:
    sizes: dict[str, set[int]] = {}
    for row in rows:
        for name, values in row.evidence.items():
            sizes.setdefault(name, set()).add(len(values))
    return [name for name, found in sizes.items() if found == {1} and name != "importance"]


def _reader(name: str) -> Callable[[PlanRow], float | None]:
    return lambda row: next(iter(row.evidence.get(name, ())), None)


def _placed(
    rows: Sequence[PlanRow], read: Callable[[PlanRow], float | None]
) -> tuple[list[list[float]], list[str], list[str]] | None:
    """Put numbers into a table of roles by layers, NaN where there is none."""
    cells = [(row.layer, row.role, value) for row in rows if row.layer is not None and (value := read(row)) is not None]
    if not any(math.isfinite(value) for _, _, value in cells):
        return None
    layers = sorted({row.layer for row in rows if row.layer is not None})
    roles = list(dict.fromkeys(role for _, role, _ in cells))
    table = [[math.nan] * len(layers) for _ in roles]
    for layer, role, value in cells:
        table[roles.index(role)][layers.index(layer)] = float(value)
    return table, roles, [str(layer) for layer in layers]


def _map(
    name: str, words: str, rows: Sequence[PlanRow], read: Callable[[PlanRow], float | None], said: str, scale: str
) -> list[Chart]:
    found = _placed(rows, read)
    if found is None:
        return []
    table, roles, layers = found
    top = max(value for row in table for value in row if math.isfinite(value))
    whole = all(value == int(value) for row in table for value in row if math.isfinite(value))
    texts = [[_cell(value, whole) for value in row] for row in table] if len(layers) <= 16 else None
    span = (min(0.0, *(value for row in table for value in row if math.isfinite(value))), top)
    figure = heat_map(table, roles, layers, scale=scale, across="layer", down="", said=said, texts=texts, span=span)
    return [Chart(name, words, words, figure, max(130 + 26 * min(len(roles), 24), _LEAST))]


def _cell(value: float, whole: bool) -> str:
    return "" if not math.isfinite(value) else f"{value:.0f}" if whole else f"{value:.2g}"


def _logarithmic(
    name: str, words: str, rows: Sequence[PlanRow], read: Callable[[PlanRow], float | None], said: str
) -> list[Chart]:
    """Draw numbers above zero by their logarithms; what is hovered or written is the number."""

    def logarithm(row: PlanRow) -> float | None:
        value = read(row)
        return math.log10(value) if value is not None and value > 0 else None

    found = _placed(rows, logarithm)
    if found is None:
        return []
    table, roles, layers = found
    good = [value for row in table for value in row if math.isfinite(value)]
    low, high = min(good), max(good)
    low, high = (low, high) if high - low > 0.01 else (low - 0.3, high + 0.3)
    places = [float(place) for place in numpy.linspace(low, high, 4)]
    texts = [["" if math.isnan(value) else importance(10**value) for value in row] for row in table]
    figure = heat_map(
        *(table, roles, layers),
        scale="warm",
        across="layer",
        down="",
        said=said,
        texts=texts,
        span=(low, high),
        ticks=(places, [importance(10**place) for place in places]),
    )
    if len(layers) > 12:
        del figure["data"][0]["texttemplate"]
    return [Chart(name, words, words, figure, max(130 + 26 * min(len(roles), 24), _LEAST))]


def votes(report: Report) -> list[Chart]:
    """Draw how many texts named each node, block by block, behind plans that count votes (LoKI).

    Args:
        report: The report.

    Returns:
        A heat map of layers by nodes for each such method; many nodes are averaged in bins.
    """
    found = []
    for place, method in enumerate(methods(report)):
        rows = [row for row in plan_of(report, method.label) if len(row.evidence.get("votes", ())) > 1]
        if not rows or len({len(row.evidence["votes"]) for row in rows}) > 1:
            continue
        counts = numpy.asarray([row.evidence["votes"] for row in rows], dtype=float)
        edges = numpy.linspace(0, counts.shape[1], min(counts.shape[1], _BINS) + 1).round().astype(int)
        table = numpy.add.reduceat(counts, edges[:-1], axis=1) / numpy.diff(edges)
        if not table.max() > 0:
            continue
        columns = [f"{a}" if b - a == 1 else f"{a}–{b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
        names = [str(row.layer if row.layer is not None else row.target) for row in rows]
        figure = heat_map(
            *(table.tolist(), names, columns),
            scale="cool",
            across="node",
            down="layer",
            said="texts that name the node, mean",
            span=(0.0, float(table.max())),
            decimals=1,
        )
        words = f"How many texts name each node, by layer: {method.label}"
        found.append(Chart(f"votes{place}", words, words, figure, max(130 + 24 * min(len(rows), 26), _LEAST)))
    return found


def traces(records: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Draw what causal tracing found for runs that have it.

    Args:
        records: Name to what is in ``trace.json``.

    Returns:
        A profile and a heat map for each.
    """
    found = []
    for place, (name, record) in enumerate(records.items()):
        found.append(_profile(f"profile{place}", name, record))
        example = record["example"]
        noised = set(example["noised"])
        words = [f"{word}{'*' if index in noised else ''}" for index, word in enumerate(example["prompt"])]
        for number, model in enumerate(record["models"]):
            table = numpy.asarray(model["heat"], dtype=float).T
            most = float(numpy.abs(table).max()) or 1.0
            layers = [str(layer) for layer in range(table.shape[1])]
            figure = heat_map(
                *(table.tolist(), words, layers),
                scale="loss",
                across="layer",
                down="token",
                said="probability brought back",
                span=(-most, most),
            )
            figure["data"][0]["reversescale"] = True
            told = f"Causal tracing of one prompt, {model['name']}: tokens by layers, * got noise ({name})"
            found.append(
                Chart(f"trace{place}-{number}", told, told, figure, max(130 + 20 * min(len(words), 40), _LEAST))
            )
    return found


def _profile(key: str, name: str, record: Mapping[str, Any]) -> Chart:
    lines = []
    for index, model in enumerate(record["models"]):
        look = mark(index)
        arms = [0.0 if error is None else 1.96 * error for error in model["AIE_error"]]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(model["name"]),
                "x": list(range(len(model["AIE"]))),
                "y": list(model["AIE"]),
                "error_y": {"type": "data", "array": arms, "color": look.colour, "thickness": 1, "width": 2},
                "line": {"color": look.colour, "dash": look.dash},
                "marker": {"symbol": look.symbol, "size": 7},
            }
        )
    layout = {"xaxis": axis("layer"), "yaxis": axis("average indirect effect (AIE)")}
    words = f"Causal tracing: effect of each layer, 95% intervals over texts ({name})"
    return Chart(key, words, words, {"data": lines, "layout": layout}, 360)


def penalties(report: Report) -> list[Chart]:
    """Draw task loss and penalty over the steps, and how far each layer moved, for methods with penalties.

    Args:
        report: The report.

    Returns:
        Two figures for each of at most eight methods, with its first seed.
    """
    shown = [(m.label, m.runs[0]) for m in methods(report) if len(m.runs[0].drift) > 1][:MANY]
    found = []
    for place, (label, run) in enumerate(shown):
        found.append(_costs(f"penalty{place}", label, run))
        drifted = _drift(f"drift{place}", label, run)
        found += [] if drifted is None else [drifted]
    return found


def _costs(key: str, label: str, run: Run) -> Chart:
    loss = dict(run.loss)
    steps = [row.step for row in run.drift]
    series = (("task loss", [loss.get(step) for step in steps]), ("penalty", [row.penalty for row in run.drift]))
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": steps,
            "y": values,
            "line": {"color": mark(index).colour, "dash": mark(index).dash, "width": 2},
        }
        for index, (name, values) in enumerate(series)
    ]
    # The loss falls from far above what a penalty costs: the start is cut off.
    late = [value for _, values in series for value in values[len(values) // 5 :] if value is not None]
    top = 1.1 * max([value for value in late if math.isfinite(value)], default=1.0)
    layout = {"xaxis": axis("training step"), "yaxis": axis("nats", range=[0, top or 1.0])}
    words = f"Task loss and penalty: {label}"
    return Chart(key, words, words, {"data": lines, "layout": layout}, 330)


def _drift(key: str, label: str, run: Run) -> Chart | None:
    layers = sorted({layer for row in run.drift for layer in row.layers})
    if not layers:
        return None
    stride = max(math.ceil(len(run.drift) / _STEPS), 1)
    rows = run.drift[::stride]
    table = [[row.layers.get(layer, math.nan) for row in rows] for layer in layers]
    figure = heat_map(
        *(table, [str(layer) for layer in layers], [f"{row.step:g}" for row in rows]),
        scale="warm",
        across="training step",
        down="layer",
        said="‖ΔW‖ / ‖W‖",
        span=(0.0, max(value for row in table for value in row if math.isfinite(value))),
    )
    figure["data"][0] |= {"xgap": 0}
    words = f"Drift of each layer while training, ‖ΔW‖ / ‖W‖: {label}"
    return Chart(key, words, words, figure, max(130 + 22 * min(len(layers), 26), _LEAST))
