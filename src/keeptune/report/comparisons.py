"""Reading of ``runs.json`` and ``front.json``: units of the axes, labels and their order, ranges, settings as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.report.numbers import count, duration, ends, number, points

Points = Sequence[Mapping[str, Any]]
Runs = Sequence[Mapping[str, Any]]


class Scales:
    """How the two axes of a comparison are printed: shares forgotten as points, everything else as it is."""

    def __init__(self, front: Mapping[str, Any]) -> None:
        units = front.get("units") or {}
        units = units if isinstance(units, Mapping) else {"learned": units, "forgotten": units}
        axes = front.get("axes") or {}
        self.nats = units.get("forgotten") == "nats"
        self.factor = 1.0 if self.nats else 100.0
        self.unit = "nats/token" if self.nats else "points"
        score = "minus nats/token" if units.get("learned") == "nats" else "accuracy"
        self.across = f"learned: {_named(axes.get('learned') or [], 'the task')} ({score} after training)"
        self.up = f"forgotten: {_named(axes.get('forgotten') or [], 'knowledge')} ({self.unit})"

    def lost(self, value: float | None, signed: bool = False) -> str:
        """Returns what was forgotten as text, without its unit."""
        if value is None or not math.isfinite(value):
            return "–"
        text = number(value) if self.nats else points(100 * value)
        return f"+{text}" if signed and value > 0 and float(text.replace("−", "-")) else text

    def spread(self, numbers: Mapping[str, Any] | None, signed: bool = False) -> str:
        """Returns a mean with its interval as text."""
        if numbers is None or numbers.get("mean") is None:
            return "–"
        low, high = ends(numbers)
        text = self.lost(numbers["mean"], signed)
        return text if math.isnan(low) else f"{text} [{self.lost(low, signed)}, {self.lost(high, signed)}]"

    def place(self, point: Mapping[str, Any]) -> tuple[float, float]:
        """Returns where a point of the front is drawn."""
        return float(point["learned"]["mean"]), self.factor * point["forgotten"]["mean"]


def labels_of(runs: Runs, front: Mapping[str, Any]) -> dict[str, int]:
    """Returns the labels with their numbers in the order of the runs, which decide their looks."""
    names = [str(row["label"]) for row in (*runs, *front["points"])]
    return {label: index for index, label in enumerate(dict.fromkeys(names))}


def setting_rows(row: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Returns how a run or point was set, as names and values; the first four rows are those that all have."""
    rate, strength, variant = row.get("learning_rate"), row.get("strength"), row.get("variant") or {}
    rows: list[tuple[str, object]] = [
        ("method", row.get("method")),
        ("variant of", row.get("of")),
        ("learning rate", None if rate is None else f"{rate:g}"),
        ("strength", None if strength is None else f"× {strength:g}"),
    ]
    rows += [(key, f"{value:g}" if isinstance(value, float) else value) for key, value in variant.items()]
    named = {"learning_rate", "train.learning_rate"}
    return [*rows, *((key, value) for key, value in (row.get("settings") or {}).items() if key not in named)]


def cost(row: Mapping[str, Any]) -> str:
    """Returns what a run trained and how long it took, such as "109 k in 21 s"."""
    seconds, trained = (row.get("seconds") or {}).get("train"), row.get("trained_parameters")
    parts = [*([] if trained is None else [count(trained)]), *([] if seconds is None else [duration(seconds)])]
    return " in ".join(parts) or "–"


def is_placed(row: Mapping[str, Any]) -> bool:
    """Returns whether a run is finished and has a place on both axes."""
    return row["status"] == "done" and row.get("learned") is not None and row.get("forgotten") is not None


def ranges(runs: Runs, front: Mapping[str, Any], base: float | None) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the ends of both axes around what was measured, with the least forgotten at the top.

    The intervals of two seeds reach far beyond and are cut off; ``base`` is the base's task score where it is known.
    """
    factor = Scales(front).factor
    rows = [row for row in runs if is_placed(row)]
    xs = [p["learned"]["mean"] for p in front["points"]] + [row["learned"] for row in rows]
    ys = [p["forgotten"]["mean"] for p in front["points"]] + [row["forgotten"] for row in rows]
    xs, ys = ([*xs, base], [*ys, 0.0]) if base is not None else (xs, ys)
    wide, high = max(max(xs) - min(xs), 0.01), max(max(ys) - min(ys), 0.01)
    across = (min(xs) - 0.05 * wide, max(xs) + 0.05 * wide)
    return across, (factor * (max(ys) + 0.06 * high), factor * (min(ys) - 0.06 * high))


def _named(names: Sequence[str], other: str) -> str:
    return " and ".join(names) if 0 < len(names) < 3 else f"mean of {len(names)} benchmarks" if names else other
