"""The figures of a comparison's page: settings with their fronts, and hypervolumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keeptune.report.charts import Chart, Mark, axis, errors, hover, mark, plain
from keeptune.report.run_charts import base_star
from keeptune.report.wording import count, duration, number, points

__all__ = ["Points", "Scales", "by_volume", "cost", "fronts", "hypervolumes", "labels_of", "ranges", "setting_rows"]

Points = Sequence[Mapping[str, Any]]
Cells = Sequence[Mapping[str, Any]]
_CLUTTER: Final = 40  # with more settings only those on a front have bars
_SEEDS: Final = 400  # cells above which they are not drawn one by one


class Scales:
    """How the two axes are printed: shares forgotten as points, everything else as it is.

    Args:
        front: As in ``front.json``.
    """

    def __init__(self, front: Mapping[str, Any]) -> None:
        units = front.get("units") or {}
        units = units if isinstance(units, Mapping) else {"learned": units, "forgotten": units}
        axes = front.get("axes") or {}
        self.nats = units.get("forgotten") == "nats"
        self.factor = 1.0 if self.nats else 100.0
        self.unit = "nats/token" if self.nats else "points"
        learned, forgotten = list(axes.get("learned") or []), list(axes.get("forgotten") or [])
        score = "minus nats/token" if units.get("learned") == "nats" else "accuracy"
        self.across = f"learned: {_named(learned, 'the task')} ({score} after training)"
        self.up = f"forgotten: {_named(forgotten, 'knowledge')} ({self.unit})"

    def lost(self, value: float | None, signed: bool = False) -> str:
        """Print what was forgotten, without its unit.

        Args:
            value: The number as in the record.
            signed: Whether a gain over the other side shows its sign.

        Returns:
            The text.
        """
        if value is None or not math.isfinite(value):
            return "–"
        text = number(value) if self.nats else points(100 * value)
        return f"+{text}" if signed and value > 0 and float(text.replace("−", "-")) else text

    def spread(self, numbers: Mapping[str, Any] | None, signed: bool = False) -> str:
        """Print a mean with its interval.

        Args:
            numbers: ``mean``, ``low`` and ``high``, None where there is no number.
            signed: As in :meth:`lost`.

        Returns:
            The text.
        """
        if numbers is None or numbers.get("mean") is None:
            return "–"
        text = self.lost(numbers["mean"], signed)
        if numbers.get("low") is None or numbers.get("high") is None:
            return text
        return f"{text} [{self.lost(numbers['low'], signed)}, {self.lost(numbers['high'], signed)}]"


def _named(names: Sequence[str], other: str) -> str:
    return " and ".join(names) if 0 < len(names) < 3 else f"mean of {len(names)} benchmarks" if names else other


def labels_of(cells: Cells, front: Mapping[str, Any]) -> dict[str, int]:
    """Number the labels in the order of the cells, which settles their looks.

    Args:
        cells: Rows of ``runs.json``.
        front: As in ``front.json``.

    Returns:
        Label to number.
    """
    names = [str(row["label"]) for row in (*cells, *front["points"])]
    return {label: index for index, label in enumerate(dict.fromkeys(names))}


def setting_rows(row: Mapping[str, Any]) -> list[tuple[str, object]]:
    """List how a cell or point was set.

    Args:
        row: Of ``runs.json`` or ``front.json``.

    Returns:
        Names and values.
    """
    rate, strength, knob = row.get("learning_rate"), row.get("strength"), row.get("variant") or {}
    rows: list[tuple[str, object]] = [
        ("method", row.get("method")),
        ("variant of", row.get("of")),
        ("learning rate", None if rate is None else f"{rate:g}"),
        ("strength", None if strength is None else f"× {strength:g}"),
    ]
    rows += [(key, f"{value:g}" if isinstance(value, float) else value) for key, value in knob.items()]
    named = {"learning_rate", "train.learning_rate"}
    return [*rows, *((key, value) for key, value in (row.get("settings") or {}).items() if key not in named)]


def fronts(cells: Cells, front: Mapping[str, Any], base: float | None) -> Chart | None:
    """Draw every setting, the front of each label and the front over all.

    Args:
        cells: Rows of ``runs.json``.
        front: As in ``front.json``.
        base: The base's task score; None where it is not known.

    Returns:
        The figure; None without points.
    """
    found: Points = front["points"]
    if not found:
        return None
    scales, numbered = Scales(front), labels_of(cells, front)
    crowded = len(found) > _CLUTTER
    by_name = {point["name"]: point for point in found}
    traces: list[dict[str, Any]] = []
    for label, index in numbered.items():
        members = [point for point in found if point["label"] == label]
        if not members:
            continue
        look = mark(index)
        on = [by_name[name] for name in front["fronts"].get(label, []) if name in by_name]
        traces += [_line(label, look, on, scales)] if len(on) > 1 else []
        rows = [row for row in cells if row["label"] == label and _placed(row)]
        if len(cells) <= _SEEDS and any(len(point["seeds"]) > 1 for point in members):
            traces.append(_singles(label, look, rows, scales))
        traces.append(_settings(label, look, members, scales, shown=not crowded))
    over = [by_name[name] for name in front["front"] if name in by_name]
    traces.insert(0, _best(over, scales, barred=crowded))
    chosen = front.get("choice") or {}
    if chosen.get("learned") is not None and chosen.get("forgotten") is not None:
        traces.append(_ring(chosen, scales))
    if base is not None:
        traces.append(base_star(base, 0.0))
    ends = ranges(cells, front, base)
    layout = {
        "xaxis": axis(scales.across, range=list(ends[0])),
        "yaxis": axis(scales.up, range=list(ends[1])),
        "meta": {"bars": "of the label that is shown alone" if crowded else "all"},
        "hovermode": "closest",
        "legend": {"itemsizing": "constant"},
    }
    shown = tuple(label for label in numbered if any(point["label"] == label for point in found))
    words = "What each setting learned against what it forgot, with the front of each label and of all"
    return Chart("tradeoff", words, "", {"data": traces, "layout": layout}, 560, shown)


def ranges(
    cells: Cells, front: Mapping[str, Any], base: float | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Frame what was measured; the intervals of two seeds reach far beyond and are cut off.

    Args:
        cells: Rows of ``runs.json``.
        front: As in ``front.json``.
        base: The base's task score; None where it is not known.

    Returns:
        The ends of the horizontal axis, and of the vertical one: the least forgotten at its top.
    """
    scales = Scales(front)
    rows = [row for row in cells if _placed(row)]
    xs = [p["learned"]["mean"] for p in front["points"]] + [row["learned"] for row in rows]
    ys = [p["forgotten"]["mean"] for p in front["points"]] + [row["forgotten"] for row in rows]
    xs, ys = ([*xs, base], [*ys, 0.0]) if base is not None else (xs, ys)
    wide, high = max(max(xs) - min(xs), 0.01), max(max(ys) - min(ys), 0.01)
    across = (min(xs) - 0.05 * wide, max(xs) + 0.05 * wide)
    down = (scales.factor * (max(ys) + 0.06 * high), scales.factor * (min(ys) - 0.06 * high))
    return across, down


def _placed(row: Mapping[str, Any]) -> bool:
    return row["status"] == "done" and row.get("learned") is not None and row.get("forgotten") is not None


def _line(label: str, look: Mark, on: Points, scales: Scales) -> dict[str, Any]:
    ordered = sorted(on, key=lambda point: float(point["learned"]["mean"]))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(f"{label}, front"),
        "legendgroup": label,
        "showlegend": False,
        "x": [point["learned"]["mean"] for point in ordered],
        "y": [scales.factor * point["forgotten"]["mean"] for point in ordered],
        "line": {"color": look.colour, "dash": look.dash, "width": 1.3},
        "hoverinfo": "skip",
    }


def _best(over: Points, scales: Scales, barred: bool) -> dict[str, Any]:
    ordered = sorted(over, key=lambda point: float(point["learned"]["mean"]))
    bars = _bars(ordered, "--muted", scales, shown=True) if barred else {}
    return {
        **bars,
        "type": "scatter",
        "mode": "lines",
        "name": "front over all",
        "x": [point["learned"]["mean"] for point in ordered],
        "y": [scales.factor * point["forgotten"]["mean"] for point in ordered],
        "line": {"color": "--front", "width": 7},
        "opacity": 0.5,
        "hoverinfo": "skip",
    }


def _ring(chosen: Mapping[str, Any], scales: Scales) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "choice",
        "x": [chosen["learned"]],
        "y": [scales.factor * chosen["forgotten"]],
        "marker": {"symbol": "circle-open", "size": 24, "color": "--ink", "line": {"width": 2.5}},
        "hoverinfo": "skip",
    }


def _singles(label: str, look: Mark, rows: Cells, scales: Scales) -> dict[str, Any]:
    told = []
    for row in rows:
        scores = [("learned", number(row["learned"])), ("forgotten", f"{scales.lost(row['forgotten'])} {scales.unit}")]
        told.append(hover(f"{label}, seed {row['seed']}", [*scores, *setting_rows(row)]))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(f"{label}, seeds"),
        "legendgroup": label,
        "showlegend": False,
        "x": [row["learned"] for row in rows],
        "y": [scales.factor * row["forgotten"] for row in rows],
        "marker": {"symbol": f"{look.symbol}-open", "size": 5, "color": look.colour, "opacity": 0.5},
        "hovertext": told,
        "hoverinfo": "text",
    }


def _settings(label: str, look: Mark, members: Points, scales: Scales, shown: bool) -> dict[str, Any]:
    told = [hover(str(point["name"]), _scores(point, scales) + setting_rows(point)) for point in members]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(label),
        "legendgroup": label,
        "x": [point["learned"]["mean"] for point in members],
        "y": [scales.factor * point["forgotten"]["mean"] for point in members],
        **_bars(members, look.colour, scales, shown),
        "marker": {
            "symbol": [look.symbol if not point.get("variant") else f"{look.symbol}-open" for point in members],
            "size": [12 if point["on_front"] else 9 for point in members],
            "color": look.colour,
            "line": {"width": [1.6 if point.get("variant") else 0.8 for point in members],
                     "color": look.colour if all(point.get("variant") for point in members) else "--paper"},
        },
        "hovertext": told,
        "hoverinfo": "text",
    }  # fmt: skip


def _bars(points: Points, colour: str, scales: Scales, shown: bool) -> dict[str, Any]:
    found = {}
    for name, key, factor in (("error_x", "learned", 1.0), ("error_y", "forgotten", scales.factor)):
        arms = [_arms(point[key], factor) for point in points]
        line = {"color": colour, "thickness": 0.9, "width": 2, "visible": shown}
        found[name] = {"type": "data", "array": [a for a, _ in arms], "arrayminus": [b for _, b in arms], **line}
    return found


def _arms(numbers: Mapping[str, Any], factor: float) -> tuple[float, float]:
    if numbers.get("low") is None or numbers.get("high") is None:
        return 0.0, 0.0
    return errors(factor * numbers["mean"], factor * numbers["low"], factor * numbers["high"])


def _scores(point: Mapping[str, Any], scales: Scales) -> list[tuple[str, object]]:
    learned = point["learned"]
    text = number(learned["mean"])
    if learned.get("low") is not None:
        text += f" [{number(learned['low'])}, {number(learned['high'])}]"
    seeds = ", ".join(map(str, point["seeds"]))
    return [
        ("learned", text),
        ("forgotten", f"{scales.spread(point['forgotten'])} {scales.unit}"),
        ("seeds" if len(point["seeds"]) > 1 else "seed", seeds),
        ("on the front", "yes" if point["on_front"] else None),
    ]


def by_volume(front: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """List the labels that have a hypervolume, the largest first.

    Args:
        front: As in ``front.json``.

    Returns:
        Label to what is known of its hypervolume.
    """
    found = {label: item for label, item in front["hypervolume"].items() if item.get("mean") is not None}
    return dict(sorted(found.items(), key=lambda item: -float(item[1]["mean"])))


def hypervolumes(cells: Cells, front: Mapping[str, Any]) -> Chart | None:
    """Draw the hypervolume of each label, the largest on top.

    Args:
        cells: Rows of ``runs.json``.
        front: As in ``front.json``.

    Returns:
        The figure; None without hypervolumes.
    """
    found = by_volume(front)
    if not found:
        return None
    ordered = list(found)
    numbered = labels_of(cells, front)
    arms = []
    for label in ordered:
        item = found[label]
        low, high = (math.nan if item.get(key) is None else float(item[key]) for key in ("low", "high"))
        arms.append(errors(float(item["mean"]), low, high))
    told = [
        hover(
            label,
            [
                ("hypervolume", number(found[label]["mean"])),
                ("interval", _ends(found[label])),
                ("settings", found[label].get("points")),
                ("seeds", ", ".join(map(str, found[label].get("seeds") or [])) or None),
            ],
        )
        for label in ordered
    ]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [found[label]["mean"] for label in ordered],
        "y": list(range(len(ordered))),
        "marker": {"color": [mark(numbered[label]).colour for label in ordered]},
        "error_x": {
            "type": "data",
            "array": [a for a, _ in arms],
            "arrayminus": [b for _, b in arms],
            "color": "--ink",
            "thickness": 1,
            "width": 3,
        },
        "hovertext": told,
        "hoverinfo": "text",
    }
    ticks = {"tickvals": list(range(len(ordered))), "ticktext": [plain(label) for label in ordered]}
    layout = {
        "xaxis": axis("hypervolume", rangemode="tozero"),
        "yaxis": {"autorange": "reversed", "tickmode": "array", "showgrid": False, **ticks},
        "bargap": 0.3,
    }
    figure = {"data": [trace], "layout": layout}
    return Chart("hypervolume", "Hypervolume of each label", "", figure, 90 + 24 * len(ordered))


def _ends(item: Mapping[str, Any]) -> str | None:
    if item.get("low") is None or item.get("high") is None:
        return None
    return f"{number(item['low'])} to {number(item['high'])}"


def cost(row: Mapping[str, Any]) -> str:
    """Print what a cell trained and how long it took.

    Args:
        row: Of ``runs.json``.

    Returns:
        For example "109 k in 21 s".
    """
    seconds = (row.get("seconds") or {}).get("train")
    parts = [] if row.get("trained_parameters") is None else [count(row["trained_parameters"])]
    return " in ".join([*parts, *([] if seconds is None else [duration(seconds)])]) or "–"
