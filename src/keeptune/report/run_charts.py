"""The figures of a run's page: what was learned against what was kept, what was lost where, and the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keeptune.core.intervals import Estimate, combine
from keeptune.report.charts import Chart, axis, errors, heat_map, hover, mark, plain
from keeptune.report.heat import short
from keeptune.report.maps import relation_losses
from keeptune.report.plots import smooth_mean, thin
from keeptune.report.records import Report, Run
from keeptune.report.style import MANY
from keeptune.report.summary import Method, Series, kept, learned, lost, methods, series
from keeptune.report.verdict import yardstick
from keeptune.report.wording import count, duration, listing, number, signed

__all__ = ["base_star", "estimate_text", "losses", "relations", "setting", "tradeoff"]

_MOST_RELATIONS = 40


def tradeoff(report: Report) -> Chart | None:
    """Draw what was learned against what was kept; hovering a point shows its setting.

    Args:
        report: The report.

    Returns:
        The figure; None when the report has no task or no knowledge benchmark.
    """
    knowledge, task = yardstick(report, "knowledge"), yardstick(report, "task")
    if not knowledge or not task:
        return None
    nats = knowledge[0].lower_is_better
    traces: list[dict[str, Any]] = []
    for index, method in enumerate(methods(report)):
        x, y = learned(method, task), lost(method, knowledge) if nats else kept(method, knowledge)
        if x is not None and y is not None:
            traces += _spot(method, index, x, y, task, knowledge)
    befores = [item.before for run in report.runs for item in run.benchmarks if item.name in {t.name for t in task}]
    start = combine([(value, value, value) for value in befores])
    if not traces or start is None:
        return None
    traces.append(base_star(start.mean, 0.0 if nats else 100.0))
    across = f"learned: {_names(task, 'task')} ({'loss, nats/token' if task[0].lower_is_better else 'accuracy'})"
    up = f"{'forgotten' if nats else 'kept'}: {_names(knowledge, 'knowledge')} "
    up += "(nats/token)" if nats else "(% of the base)"
    layout = {
        "xaxis": axis(across, **({"autorange": "reversed"} if task[0].lower_is_better else {})),
        "yaxis": axis(up, **({"autorange": "reversed"} if nats else {})),
        "hovermode": "closest",
    }
    labels = tuple(method.label for method in methods(report))
    figure = {"data": traces, "layout": layout}
    return Chart("tradeoff", "What each method learned against what it kept", "", figure, 480, labels)


def base_star(x: float, y: float) -> dict[str, Any]:
    """Mark the base model.

    Args:
        x: Its task score.
        y: Where nothing is forgotten.

    Returns:
        The trace.
    """
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "base model",
        "x": [x],
        "y": [y],
        "marker": {"symbol": "star", "size": 14, "color": "--ink", "line": {"width": 1, "color": "--paper"}},
        "hovertext": [hover("base model", [("learned", number(x)), ("forgotten", "nothing")])],
        "hoverinfo": "text",
    }


def _spot(
    method: Method, index: int, x: Estimate, y: Estimate, task: Sequence[Series], knowledge: Sequence[Series]
) -> list[dict[str, Any]]:
    look = mark(index)
    common = {"type": "scatter", "mode": "markers", "legendgroup": method.label, "hoverinfo": "text"}
    bars: dict[str, Any] = {"color": look.colour, "thickness": 1.2, "width": 3}
    ends = {name: errors(value.mean, value.low, value.high) for name, value in (("x", x), ("y", y))}
    rows = [("learned", estimate_text(x)), ("forgotten" if knowledge[0].lower_is_better else "kept", estimate_text(y))]
    found: list[dict[str, Any]] = [
        {
            **common,
            "name": plain(method.label),
            "x": [x.mean],
            "y": [y.mean],
            "error_x": {"type": "data", "array": [ends["x"][0]], "arrayminus": [ends["x"][1]], **bars},
            "error_y": {"type": "data", "array": [ends["y"][0]], "arrayminus": [ends["y"][1]], **bars},
            "marker": {
                "symbol": look.symbol,
                "size": 13,
                "color": look.colour,
                "line": {"width": 1, "color": "--paper"},
            },
            "hovertext": [hover(method.label, [*rows, *setting(method.runs)])],
        }
    ]
    singles = [(run, Method(method.label, (run,))) for run in method.runs] if len(method.runs) > 1 else []
    places = [
        (run, learned(one, task), (lost if knowledge[0].lower_is_better else kept)(one, knowledge))
        for run, one in singles
    ]
    shown = [(run, a, b) for run, a, b in places if a is not None and b is not None]
    if shown:  # below the mean, which would else be hard to hover
        found.insert(
            0,
            {
                **common,
                "name": plain(f"{method.label}, seeds"),
                "showlegend": False,
                "x": [a.mean for _, a, _ in shown],
                "y": [b.mean for _, _, b in shown],
                "marker": {"symbol": f"{look.symbol}-open", "size": 7, "color": look.colour, "opacity": 0.8},
                "hovertext": [
                    hover(
                        f"{method.label}, seed {run.seed}",
                        [("learned", number(a.mean)), (rows[1][0], number(b.mean)), *setting((run,))],
                    )
                    for run, a, b in shown
                ],
            },
        )
    return found


def setting(runs: Sequence[Run]) -> list[tuple[str, object]]:
    """List how a method was set and what it cost.

    Args:
        runs: Its runs.

    Returns:
        Names and values; of options that differ between the runs all values.
    """
    rows: list[tuple[str, object]] = [("seeds" if len(runs) > 1 else "seed", ", ".join(str(run.seed) for run in runs))]
    for key in dict.fromkeys(key for run in runs for key in run.options):
        values = dict.fromkeys(_value(run.options.get(key)) for run in runs)
        if key != "train.seed" and list(values) != ["–"]:
            rows.append((key.removeprefix("train.").replace("_", " "), ", ".join(values)))
    trained = runs[0].trained_parameters
    rows += [("trained parameters", None if trained is None else count(trained))]
    scores = [(name, [getattr(run, name) for run in runs]) for name in ("K", "T", "KT")]
    rows += [(name, number(_mean(found))) for name, found in scores if _mean(found) is not None]
    seconds = [run.seconds["train"] for run in runs if "train" in run.seconds]
    return [*rows, ("training", duration(sum(seconds) / len(seconds)) if seconds else None)]


def estimate_text(estimate: Estimate) -> str:
    """Print an estimate with its interval.

    Args:
        estimate: The estimate.

    Returns:
        For example "0.912 [0.890, 0.931]".
    """
    if not estimate.has_interval:
        return number(estimate.mean)
    return f"{number(estimate.mean)} [{number(estimate.low)}, {number(estimate.high)}]"


def _mean(values: Sequence[float | None]) -> float | None:
    good = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(good) / len(good) if good else None


def _value(item: object) -> str:
    if isinstance(item, list | tuple):
        return " ".join(map(_value, item))
    return "–" if item is None else f"{item:g}" if isinstance(item, float) else str(item)


def _names(chosen: Sequence[Series], role: str) -> str:
    few = listing([item.name for item in chosen])
    return few if len(chosen) == 1 or len(few) <= 24 else f"mean of {len(chosen)} {role} benchmarks"


def relations(report: Report) -> list[Chart]:
    """Draw what was lost on each relation: bars for one method, a heat map for several.

    Args:
        report: The report.

    Returns:
        A figure for each knowledge benchmark that has groups.
    """
    found = []
    for place, kind in enumerate(series(report, "knowledge")):
        table = relation_losses(report, kind)
        if not table:
            continue
        shown = dict(list(table.items())[:_MOST_RELATIONS])
        names = [f"{short(name, 28)} (n={size})" for name, (size, _) in shown.items()]
        unit = "nats/token lost" if kind.lower_is_better else "points lost"
        values = [losses for _, losses in shown.values()]
        labels = [method.label for method in methods(report)]
        decimals = 3 if kind.lower_is_better else 0
        if len(labels) == 1:
            figure = _bars([row[0] for row in values], names, unit, decimals)
        else:
            top = max((abs(v) for row in values for v in row if math.isfinite(v)), default=1.0) or 1.0
            texts = [[signed(v, decimals).lstrip("+") if math.isfinite(v) else "" for v in row] for row in values]
            figure = heat_map(
                *(values, names, labels),
                scale="loss",
                across="",
                down="",
                said=unit,
                texts=texts if len(labels) <= MANY else None,
                span=(-top, top),
                decimals=decimals,
            )
            figure["layout"]["xaxis"] |= {"side": "top", "tickangle": -40 if len(labels) > 3 else 0}
        part = f"the {len(shown)} most forgotten of {len(table)} relations of " if len(shown) < len(table) else ""
        words = f"What was lost on each relation of {kind.name}"
        caption = f"{kind.name}: {part}{unit}, mean over seeds" if not part else f"{part}{kind.name}, {unit}"
        found.append(Chart(f"relations{place}", words, caption, figure, max(130 + 21 * len(names), 270)))
    return found


def _bars(values: Sequence[float], names: Sequence[str], unit: str, decimals: int) -> dict[str, Any]:
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": list(values),
        "y": list(range(len(names))),
        "marker": {"color": ["--loss" if value > 0 else "--gain" for value in values]},
        "text": [signed(value, decimals).lstrip("+") if math.isfinite(value) else "" for value in values],
        "textposition": "outside",
        "cliponaxis": False,
        "customdata": [plain(name) for name in names],
        "hovertemplate": "%{customdata}: %{text}<extra></extra>",
    }
    ticks = {"tickvals": list(range(len(names))), "ticktext": [plain(name) for name in names]}
    layout = {
        "xaxis": axis(unit),
        "yaxis": {"autorange": "reversed", "tickmode": "array", **ticks, "showgrid": False},
        "bargap": 0.25,
    }
    return {"data": [trace], "layout": layout}


def losses(report: Report) -> Chart | None:
    """Draw the training loss of every method, smoothed, with the raw values behind.

    Args:
        report: The report.

    Returns:
        The figure; None when no run has two or more losses.
    """
    curves = [(index, method, smooth_mean(method)) for index, method in enumerate(methods(report))]
    drawn = [(index, method, curve) for index, method, curve in curves if len(curve) > 1]
    if not drawn:
        return None
    traces: list[dict[str, Any]] = []
    for index, method, curve in drawn:
        look = mark(index)
        group = {"type": "scatter", "mode": "lines", "legendgroup": method.label}
        for run in method.runs if len(drawn) <= MANY else ():
            steps, values = thin(run.loss)
            line = {"color": look.colour, "width": 0.8}
            raw = {**group, "x": steps, "y": values, "line": line, "opacity": 0.3, "showlegend": False}
            traces.append({**raw, "name": plain(f"{method.label}, seed {run.seed}"), "hoverinfo": "skip"})
        steps, values = thin(curve)
        line = {"color": look.colour, "width": 2, "dash": look.dash}
        told = plain(method.label)
        words = f"{told}<br>step %{{x}}: %{{y:.4g}}<extra></extra>" if "%{" not in told else "%{x}: %{y}<extra></extra>"
        traces.append({**group, "name": told, "x": steps, "y": values, "line": line, "hovertemplate": words})
    layout = {
        "xaxis": axis("training step"),
        "yaxis": axis("training loss (nats/token)", **_loss_range(drawn)),
        "hovermode": "closest",
    }
    labels = tuple(method.label for _, method, _ in drawn)
    return Chart("losses", "Training loss of each method", "", {"data": traces, "layout": layout}, 420, labels)


def _loss_range(drawn: Sequence[tuple[int, Method, object]]) -> dict[str, Any]:
    """Cut off the few highest values, which would press the rest flat."""
    raw = sorted(loss for _, method, _ in drawn for run in method.runs for _, loss in run.loss)
    low, high = raw[0], raw[min(len(raw) - 1, int(0.995 * len(raw)))]
    pad = 0.05 * max(high - low, 0.01)
    return {"range": [low - pad, high + pad]}
