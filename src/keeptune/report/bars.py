"""Benchmarks before and after, with a bar for the change: to the right is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keeptune.core.intervals import Estimate
from keeptune.report.records import Report
from keeptune.report.summary import Series, series
from keeptune.report.tables import comparison_rows
from keeptune.report.wording import change_interval, number, signed

__all__ = ["Bar", "BenchmarkRow", "BenchmarkTable", "bar", "benchmark_tables"]

_WIDE: Final = 200.0


@dataclass(frozen=True)
class Bar:
    """A bar from the middle of a strip of 200 units: where it begins, how long it is, and its whiskers."""

    kind: str
    start: float
    length: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class BenchmarkRow:
    """One method on one benchmark."""

    label: str
    index: int
    before: str
    after: str
    change: str
    interval: str
    value: float
    bar: Bar


@dataclass(frozen=True)
class BenchmarkTable:
    """One benchmark, a row for each method."""

    name: str
    role: str
    metric: str
    unit: str
    n: int
    rows: tuple[BenchmarkRow, ...]


def bar(value: float, low: float, high: float, scale: float) -> Bar:
    """Lay out a bar.

    Args:
        value: The change, positive when better.
        low: The low end of its interval; NaN when there is none.
        high: The high end.
        scale: The change that fills half the strip.

    Returns:
        The bar.
    """
    half = _WIDE / 2

    def place(number: float) -> float:
        return round(half + half * 0.96 * max(-1.0, min(1.0, number / scale)), 2)

    has = math.isfinite(low) and math.isfinite(high)
    middle, end = half, place(value)
    kind = "gain" if value > 0 else "loss" if value < 0 else "none"
    ends = (place(low), place(high)) if has else (None, None)
    return Bar(kind, min(middle, end), round(abs(end - middle), 2), *ends)


def benchmark_tables(report: Report) -> list[BenchmarkTable]:
    """Tabulate the benchmarks; bars of one role and unit share a scale.

    Args:
        report: The report.

    Returns:
        A table for each benchmark, knowledge first.
    """
    rows = comparison_rows(report)
    kinds = [*series(report, "knowledge"), *series(report, "task")]
    changes = {kind.name: [_better(row[kind.role].get(kind.name), kind) for row in rows] for kind in kinds}
    found = []
    for kind in kinds:
        same = [k for k in kinds if (k.role, k.lower_is_better) == (kind.role, kind.lower_is_better)]
        reach = [abs(v) for k in same for part in changes[k.name] if part for v in part if math.isfinite(v)]
        scale = max(reach, default=1.0) or 1.0
        entries = [
            _entry(str(row["method"]), index, row[kind.role][kind.name], kind, scale)
            for index, row in enumerate(rows)
            if kind.name in row[kind.role]
        ]
        if entries:
            n = max(row[kind.role][kind.name]["n"] for row in rows if kind.name in row[kind.role])
            unit = "nats/token" if kind.lower_is_better else "points"
            found.append(BenchmarkTable(kind.name, kind.role, kind.metric, unit, n, tuple(entries)))
    return found


def _entry(label: str, index: int, numbers: Mapping[str, Any], kind: Series, scale: float) -> BenchmarkRow:
    better = _better(numbers, kind)
    assert better is not None
    moved = Estimate(numbers["change"], numbers["low"], numbers["high"], ())
    change = signed(moved.mean, 3) if kind.lower_is_better else signed(100 * moved.mean, 1)
    return BenchmarkRow(
        label,
        index,
        number(numbers["before"]),
        number(numbers["after"]),
        change,
        change_interval(moved, kind),
        better[0],
        bar(*better, scale),
    )


def _better(numbers: Mapping[str, Any] | None, kind: Series) -> tuple[float, float, float] | None:
    """Turn a change so that more is better: value, low and high."""
    if numbers is None:
        return None
    change, low, high = (float(numbers[key]) for key in ("change", "low", "high"))
    return (-change, -high, -low) if kind.lower_is_better else (change, low, high)
