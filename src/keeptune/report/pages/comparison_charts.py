"""The figure of a comparison's page: settings with their fronts; and how its records are told."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import plotly.graph_objects as go

from keeptune.core.intervals import Estimate
from keeptune.report.numbers import count, duration, ends, estimate_text, number, points
from keeptune.report.pages.charts import Chart, Mark, arms, axis, figure_of, hover, mark, plain, scatter
from keeptune.report.pages.run_charts import base_star

_CLUTTER: Final = 40  # with more settings only those on a front have bars
_SEEDS: Final = 400  # runs above which they are not drawn one by one
Points = Sequence[Mapping[str, Any]]
Runs = Sequence[Mapping[str, Any]]


class Scales:
    """How the two axes of a comparison are printed: shares forgotten as points, everything else as it is."""

    def __init__(self, front: Mapping[str, Any]) -> None:
        units, axes = front["units"] or {"learned": "share", "forgotten": "share"}, front.get("axes") or {}
        self.nats = units["forgotten"] == "nats"
        self.factor, self.unit = (1.0, "nats/token") if self.nats else (100.0, "points")
        score = "minus nats/token" if units["learned"] == "nats" else "accuracy"
        self.across = f"learned: {_named(axes.get('learned', ()))} ({score} after training)"
        self.up = f"forgotten: {_named(axes.get('forgotten', ()))} ({self.unit})"

    def lost(self, value: float | None, signed: bool = False) -> str:
        """Returns what was forgotten as text, without its unit."""
        if value is None:
            return "–"
        text = number(value) if self.nats else points(100 * value)
        return f"+{text}" if signed and value > 0 and float(text.replace("−", "-")) else text

    def spread(self, numbers: Mapping[str, Any] | None, signed: bool = False) -> str:
        """Returns a mean with its interval as text."""
        if numbers is None:
            return "–"
        low, high = ends(numbers)
        text = self.lost(numbers["mean"], signed)
        return text if math.isnan(low) else f"{text} [{self.lost(low, signed)}, {self.lost(high, signed)}]"

    def place(self, point: Mapping[str, Any]) -> tuple[float, float]:
        """Returns where a point of the front is drawn."""
        return float(point["learned"]["mean"]), self.factor * point["forgotten"]["mean"]


def labels_of(runs: Runs) -> dict[str, int]:
    """Returns the labels with their numbers in the order of the runs, which decide their looks."""
    return {label: index for index, label in enumerate(dict.fromkeys(row["label"] for row in runs))}


def setting_rows(row: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Returns how a run or point was set, as names and values; the first four rows are those that all have."""
    rate, strength = row["learning_rate"], row["strength"]
    return [
        ("method", row["method"]),
        ("variant of", row["of"]),
        ("learning rate", None if rate is None else f"{rate:g}"),
        ("strength", None if strength is None else f"× {strength:g}"),
        *((key, f"{value:g}") for key, value in (row["variant"] or {}).items()),
        *((key, value) for key, value in row["settings"].items() if key != "train.learning_rate"),
    ]


def cost(row: Mapping[str, Any]) -> str:
    """Returns what a run trained and how long it took, such as "109 k in 21 s"."""
    seconds, trained = row["seconds"]["train"], row["trained_parameters"]
    parts = [*([] if trained is None else [count(trained)]), *([] if seconds is None else [duration(seconds)])]
    return " in ".join(parts) or "–"


def is_placed(row: Mapping[str, Any]) -> bool:
    """Returns whether a run has a place on both axes."""
    return row["learned"] is not None and row["forgotten"] is not None


def ranges(runs: Runs, front: Mapping[str, Any], base: float | None) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the ends of both axes around what was measured, with the least forgotten at the top.

    The intervals of two seeds reach far beyond and are cut off; ``base`` is the base's task score where it is known.
    """
    factor = Scales(front).factor
    places = [(row["learned"], row["forgotten"]) for row in runs if is_placed(row)]
    places += [(point["learned"]["mean"], point["forgotten"]["mean"]) for point in front["points"]]
    xs, ys = zip(*places, *([] if base is None else [(base, 0.0)]), strict=True)
    wide, high = max(max(xs) - min(xs), 0.01), max(max(ys) - min(ys), 0.01)
    across = (min(xs) - 0.05 * wide, max(xs) + 0.05 * wide)
    return across, (factor * (max(ys) + 0.06 * high), factor * (min(ys) - 0.06 * high))


def _named(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"mean of {len(names)} benchmarks"


def fronts(runs: Runs, front: Mapping[str, Any], base: float | None) -> Chart | None:
    """Returns every setting of ``runs.json``, the front of each label and the front over all; None without points."""
    points: Points = front["points"]
    if not points:
        return None
    scales = Scales(front)
    crowded = len(points) > _CLUTTER
    by_name = {point["name"]: point for point in points}
    traces = [_best([by_name[name] for name in front["front"]], scales, barred=crowded)]
    shown = []
    for label, index in labels_of(runs).items():
        members = [point for point in points if point["label"] == label]
        if not members:
            continue
        shown.append(label)
        on = [by_name[name] for name in front["fronts"][label]]
        if len(on) > 1:
            xs, ys = zip(*map(scales.place, on), strict=True)
            more = {"name": plain(f"{label}, front"), "showlegend": False, "hoverinfo": "skip", "line": {"width": 1.3}}
            traces.append(scatter(label, xs, ys, mark(index), "lines", **more))
        if len(runs) <= _SEEDS and any(len(point["seeds"]) > 1 for point in members):
            rows = [row for row in runs if row["label"] == label and is_placed(row)]
            traces.append(_singles(label, mark(index), rows, scales))
        traces.append(_settings(label, mark(index), members, scales, shown=not crowded))
    if chosen := front["choice"]:
        marker = {"symbol": "circle-open", "size": 24, "color": "var(--ink)", "line": {"width": 2.5}}
        place = {"x": [chosen["learned"]], "y": [scales.factor * chosen["forgotten"]]}
        traces.append(go.Scatter(mode="markers", name="choice", marker=marker, hoverinfo="skip", **place))
    if base is not None:
        traces.append(base_star(base, 0.0))
    across, down = ranges(runs, front, base)
    figure = figure_of(
        traces,
        axis(scales.across, range=list(across)),
        axis(scales.up, range=list(down)),
        meta={"bars": "of the label that is shown alone" if crowded else "all"},
        legend={"itemsizing": "constant"},
    )
    words = "What each setting learned against what it forgot, with the front of each label and of all"
    return Chart("tradeoff", words, figure, 560, tuple(shown), "")


def _best(points: Points, scales: Scales, barred: bool) -> go.Scatter:
    xs, ys = zip(*map(scales.place, points), strict=True)
    bars = _bars(points, "var(--muted)", scales, shown=True) if barred else {}
    line = {"color": "var(--front)", "width": 7}
    about = {"name": "front over all", "mode": "lines", "opacity": 0.5, "hoverinfo": "skip"}
    return go.Scatter(x=list(xs), y=list(ys), line=line, **about, **bars)


def _singles(label: str, drawn: Mark, rows: Runs, scales: Scales) -> go.Scatter:
    hovers = []
    for row in rows:
        scores = [("learned", number(row["learned"])), ("forgotten", f"{scales.lost(row['forgotten'])} {scales.unit}")]
        hovers.append(hover(f"{label}, seed {row['seed']}", [*scores, *setting_rows(row)]))
    marker = {"symbol": f"{drawn.symbol}-open", "size": 5, "opacity": 0.5}
    more = {"name": plain(f"{label}, seeds"), "showlegend": False, "hovertext": hovers, "marker": marker}
    ys = [scales.factor * row["forgotten"] for row in rows]
    return scatter(label, [row["learned"] for row in rows], ys, drawn, "markers", **more)


def _settings(label: str, drawn: Mark, members: Points, scales: Scales, shown: bool) -> go.Scatter:
    variants = [bool(point.get("variant")) for point in members]
    marker = {
        "symbol": [f"{drawn.symbol}-open" if variant else drawn.symbol for variant in variants],
        "size": [12 if point["on_front"] else 9 for point in members],
        "line": {
            "width": [1.6 if variant else 0.8 for variant in variants],
            "color": drawn.colour if all(variants) else "var(--paper)",
        },
    }
    hovers = [hover(str(point["name"]), [*_scores(point, scales), *setting_rows(point)]) for point in members]
    xs, ys = zip(*map(scales.place, members), strict=True)
    bars = _bars(members, drawn.colour, scales, shown)
    return scatter(label, xs, ys, drawn, "markers", hovertext=hovers, marker=marker, **bars)


def _bars(points: Points, colour: str, scales: Scales, shown: bool) -> dict[str, Any]:
    bars = {}
    for name, key, factor in (("error_x", "learned", 1.0), ("error_y", "forgotten", scales.factor)):
        middles = [factor * point[key]["mean"] for point in points]
        tips = [(factor * low, factor * high) for low, high in (ends(point[key]) for point in points)]
        bars[name] = arms(middles, tips, colour, thickness=0.9, width=2, visible=shown)
    return bars


def _scores(point: Mapping[str, Any], scales: Scales) -> list[tuple[str, object]]:
    learned = Estimate(point["learned"]["mean"], *ends(point["learned"]), ())
    return [
        ("learned", estimate_text(learned)),
        ("forgotten", f"{scales.spread(point['forgotten'])} {scales.unit}"),
        ("seeds" if len(point["seeds"]) > 1 else "seed", ", ".join(map(str, point["seeds"]))),
        ("on the front", "yes" if point["on_front"] else None),
    ]
