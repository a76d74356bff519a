"""The figure of a comparison's page: settings with their fronts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import plotly.graph_objects as go

from keeptune.core.intervals import Estimate
from keeptune.report.comparisons import Points, Runs, Scales, is_placed, labels_of, ranges, setting_rows
from keeptune.report.numbers import ends, estimate_text, number
from keeptune.report.pages.charts import Chart, Mark, arms, axis, figure_of, hover, mark, plain, scatter
from keeptune.report.pages.run_charts import base_star

_CLUTTER: Final = 40  # with more settings only those on a front have bars
_SEEDS: Final = 400  # runs above which they are not drawn one by one


def fronts(runs: Runs, front: Mapping[str, Any], base: float | None) -> Chart | None:
    """Returns every setting of ``runs.json``, the front of each label and the front over all; None without points."""
    points: Points = front["points"]
    if not points:
        return None
    scales = Scales(front)
    crowded = len(points) > _CLUTTER
    by_name = {point["name"]: point for point in points}
    traces = [_best([by_name[name] for name in front["front"] if name in by_name], scales, barred=crowded)]
    shown = []
    for label, index in labels_of(runs, front).items():
        members = [point for point in points if point["label"] == label]
        if not members:
            continue
        shown.append(label)
        on = [by_name[name] for name in front["fronts"].get(label, []) if name in by_name]
        if len(on) > 1:
            traces.append(_front(label, mark(index), on, scales))
        if len(runs) <= _SEEDS and any(len(point["seeds"]) > 1 for point in members):
            rows = [row for row in runs if row["label"] == label and is_placed(row)]
            traces.append(_singles(label, mark(index), rows, scales))
        traces.append(_settings(label, mark(index), members, scales, shown=not crowded))
    chosen = front.get("choice") or {}
    if chosen.get("learned") is not None and chosen.get("forgotten") is not None:
        traces.append(_ring(chosen["learned"], scales.factor * chosen["forgotten"]))
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


def _front(label: str, drawn: Mark, points: Points, scales: Scales) -> go.Scatter:
    xs, ys = zip(*sorted(map(scales.place, points)), strict=True)
    more = {"name": plain(f"{label}, front"), "showlegend": False, "hoverinfo": "skip", "line": {"width": 1.3}}
    return scatter(label, xs, ys, drawn, "lines", **more)


def _best(points: Points, scales: Scales, barred: bool) -> go.Scatter:
    ordered = sorted(points, key=scales.place)
    bars = _bars(ordered, "var(--muted)", scales, shown=True) if barred else {}
    xs, ys = zip(*map(scales.place, ordered), strict=True) if ordered else ((), ())
    line = {"color": "var(--front)", "width": 7}
    about = {"name": "front over all", "mode": "lines", "opacity": 0.5, "hoverinfo": "skip"}
    return go.Scatter(x=list(xs), y=list(ys), line=line, **about, **bars)


def _ring(x: float, y: float) -> go.Scatter:
    marker = {"symbol": "circle-open", "size": 24, "color": "var(--ink)", "line": {"width": 2.5}}
    return go.Scatter(mode="markers", name="choice", x=[x], y=[y], marker=marker, hoverinfo="skip")


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
