"""The figures of a run's page: what was learned against what was kept, what was lost where, and the losses."""

import math
from collections.abc import Sequence
from typing import Any, Final

import plotly.graph_objects as go

from keeptune.core.intervals import Estimate, mean_of_seeds
from keeptune.report.estimates import Method, Series, methods, over, relation_losses, series, yardstick
from keeptune.report.numbers import count, duration, estimate_text, listing, number, option_text, short, signed
from keeptune.report.pages import charts
from keeptune.report.records import Report, Run

_MOST_RELATIONS: Final = 40


def tradeoff(report: Report) -> charts.Chart | None:
    """Returns what was learned against what was kept; None without a task or a knowledge benchmark."""
    knowledge, task = yardstick(report, "knowledge"), yardstick(report, "task")
    if not knowledge or not task:
        return None
    nats = knowledge[0].lower_is_better
    traces: list[Any] = []
    for index, method in enumerate(methods(report)):
        traces += _spots(method, index, knowledge, task)
    names = {item.name for item in task}
    start = mean_of_seeds([item.before for run in report.runs for item in run.benchmarks if item.name in names])
    if not traces or start is None:
        return None
    traces.append(base_star(start.mean, 0.0 if nats else 100.0))
    across = f"learned: {_names(task, 'task')} ({'loss, nats/token' if task[0].lower_is_better else 'accuracy'})"
    unit = "nats/token" if nats else "% of the base"
    up = f"{'forgotten' if nats else 'kept'}: {_names(knowledge, 'knowledge')} ({unit})"
    turned = {"autorange": "reversed"}
    figure = charts.figure_of(
        traces,
        charts.axis(across, **(turned if task[0].lower_is_better else {})),
        charts.axis(up, **(turned if nats else {})),
    )
    labels = tuple(method.label for method in methods(report))
    return charts.Chart("tradeoff", "What each method learned against what it kept", figure, 480, labels, "")


def base_star(x: float, y: float) -> go.Scatter:
    """Returns the star that marks the base model."""
    marker = {"symbol": "star", "size": 14, "color": "var(--ink)", "line": {"width": 1, "color": "var(--paper)"}}
    hovers = [charts.hover("base model", [("learned", number(x)), ("forgotten", "nothing")])]
    return go.Scatter(
        mode="markers", name="base model", x=[x], y=[y], marker=marker, hovertext=hovers, hoverinfo="text"
    )


def _spots(method: Method, index: int, knowledge: Sequence[Series], task: Sequence[Series]) -> list[go.Scatter]:
    """Returns the mean of a method and, below it so that it can be hovered, its seeds."""
    nats = knowledge[0].lower_is_better

    def place(of: Method) -> tuple[Estimate, Estimate] | None:
        x, y = over(of, "learned", task), over(of, "lost" if nats else "kept", knowledge)
        return None if x is None or y is None else (x, y)

    def hovers(title: str, x: Estimate, y: Estimate, runs: Sequence[Run]) -> str:
        scores = [("learned", estimate_text(x)), ("forgotten" if nats else "kept", estimate_text(y))]
        return charts.hover(title, [*scores, *_setting(runs)])

    whole, drawn = place(method), charts.mark(index)
    if whole is None:
        return []
    traces = []
    singles = [Method(method.label, (run,)) for run in method.runs] if len(method.runs) > 1 else []
    seeds = [(one.runs[0], at) for one in singles if (at := place(one)) is not None]
    if seeds:
        texts = [hovers(f"{method.label}, seed {run.seed}", x, y, (run,)) for run, (x, y) in seeds]
        xs, ys = [at[0].mean for _, at in seeds], [at[1].mean for _, at in seeds]
        look = {"symbol": f"{drawn.symbol}-open", "size": 7, "opacity": 0.8}
        more = {"hovertext": texts, "marker": look, "showlegend": False, "name": charts.plain(f"{method.label}, seeds")}
        traces.append(charts.scatter(method.label, xs, ys, drawn, "markers", **more))
    x, y = whole
    look = {"size": 13, "line": {"width": 1, "color": "var(--paper)"}}
    bars = {f"error_{a}": charts.arms([e.mean], [(e.low, e.high)], drawn.colour) for a, e in (("x", x), ("y", y))}
    texts = [hovers(method.label, x, y, method.runs)]
    more = {"hovertext": texts, "marker": look, **bars}
    return [*traces, charts.scatter(method.label, [x.mean], [y.mean], drawn, "markers", **more)]


def _setting(runs: Sequence[Run]) -> list[tuple[str, object]]:
    """Returns how a method was set and what it cost."""
    rows: list[tuple[str, object]] = [("seeds" if len(runs) > 1 else "seed", ", ".join(str(run.seed) for run in runs))]
    for key in dict.fromkeys(key for run in runs for key in run.options):
        values = dict.fromkeys(option_text(run.options.get(key)) for run in runs)
        if key != "train.seed" and list(values) != ["–"]:
            rows.append((key.removeprefix("train.").replace("_", " "), ", ".join(values)))
    trained = runs[0].trained_parameters
    rows.append(("trained parameters", None if trained is None else count(trained)))
    for name in ("K", "T", "KT"):
        score = mean_of_seeds([value for run in runs if (value := getattr(run, name)) is not None])
        rows.append((name, None if score is None else number(score.mean)))
    seconds = [run.seconds["train"] for run in runs if "train" in run.seconds]
    return [*rows, ("training", duration(sum(seconds) / len(seconds)) if seconds else None)]


def _names(chosen: Sequence[Series], role: str) -> str:
    few = listing([item.name for item in chosen])
    return few if len(chosen) == 1 or len(few) <= 24 else f"mean of {len(chosen)} {role} benchmarks"


def relations(report: Report) -> list[charts.Chart]:
    """Returns a map of what each method lost on each relation."""
    labels = [method.label for method in methods(report)]
    panels = []
    for place, kind in enumerate(series(report, "knowledge")):
        table = relation_losses(report, kind)
        if not table:
            continue
        shown = dict(list(table.items())[:_MOST_RELATIONS])
        names = [f"{short(name, 28)} (n={size})" for name, (size, _) in shown.items()]
        values = [losses for _, losses in shown.values()]
        unit, decimals = ("nats/token lost", 3) if kind.lower_is_better else ("points lost", 0)

        top = max((abs(v) for row in values for v in row if math.isfinite(v)), default=1.0) or 1.0

        def write(value: float, decimals: int = decimals) -> str:
            return signed(value, decimals).lstrip("+")

        figure = charts.heat_map(values, (("", names), ("", labels)), "loss", unit, write, (-top, top))
        figure.update_xaxes(side="top", tickangle=-40 if len(labels) > 3 else 0)
        caption = f"{kind.name}: {unit}, mean over seeds"
        if len(shown) < len(table):
            caption = f"the {len(shown)} most forgotten of {len(table)} relations of {kind.name}, {unit}"
        height = max(130 + 21 * len(names), charts.LEAST)
        words = f"What was lost on each relation of {kind.name}"
        panels.append(charts.Chart(f"relations{place}", words, figure, height, caption=caption))
    return panels


def losses(report: Report) -> charts.Chart | None:
    """Returns the training loss of every method, smoothed, with the raw values behind; None without losses."""
    curves = [(index, method, _smooth_mean(method)) for index, method in enumerate(methods(report))]
    drawn = [(index, method, curve) for index, method, curve in curves if len(curve) > 1]
    if not drawn:
        return None
    traces = []
    line = {"width": 0.8, "dash": "solid"}
    raw: dict[str, Any] = {"opacity": 0.3, "showlegend": False, "hoverinfo": "skip", "line": line}
    for index, method, curve in drawn:
        label, look = method.label, charts.mark(index)
        for run in method.runs if len(drawn) <= charts.MANY else ():
            own = {"name": charts.plain(f"{label}, seed {run.seed}")}
            traces.append(charts.scatter(label, *charts.thin(run.loss), look, "lines", **(raw | own)))
        name = charts.plain(label)
        words = f"{name}<br>step %{{x}}: %{{y:.4g}}<extra></extra>" if "%{" not in name else "%{x}: %{y}<extra></extra>"
        traces.append(charts.scatter(label, *charts.thin(curve), look, "lines", hovertemplate=words))
    # The few highest values are cut off, which would press the rest flat.
    values = sorted(loss for _, method, _ in drawn for run in method.runs for _, loss in run.loss)
    low, high = values[0], values[min(len(values) - 1, int(0.995 * len(values)))]
    pad = 0.05 * max(high - low, 0.01)
    up = charts.axis("training loss (nats/token)", range=[low - pad, high + pad])
    labels = tuple(method.label for _, method, _ in drawn)
    figure = charts.figure_of(traces, charts.axis("training step"), up)
    return charts.Chart("losses", "Training loss of each method", figure, 420, labels, "")


def _smooth_mean(method: Method) -> list[tuple[float, float]]:
    """Returns the mean over the seeds at each step, smoothed over about a twentieth of its length."""
    by_step: dict[float, list[float]] = {}
    for run in method.runs:
        for step, loss in run.loss:
            by_step.setdefault(step, []).append(loss)
    steps = sorted(by_step)
    means = [math.fsum(by_step[step]) / len(by_step[step]) for step in steps]
    reach = min(len(means) // 40 + 1, 25) if len(means) > 8 else 0
    smooth = []
    for index in range(len(means)):
        # A lopsided window would bend the steep start; the flat end can bear one.
        window = means[index - min(reach, index) : index + min(reach, index) + 1]
        smooth.append((steps[index], math.fsum(window) / len(window)))
    return smooth
