"""Two plans side by side for the terminal: options, ranks by layer and role, and how many starts changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan, TargetPlan
from keeptune.core.plan_differences import differences
from keeptune.report.grid import print_grid

__all__ = ["print_diff"]

_MOST_LINES = 6


def print_diff(first: Plan, second: Plan, console: Console) -> bool:
    """Print where two plans differ; nothing when they are equal.

    Args:
        first: A plan, on the left of each bar.
        second: The plan to compare with, on the right.
        console: Where to print.

    Returns:
        Whether they differ.
    """
    lines = differences(first, second)
    if not lines:
        return False
    for line in _options(first, second):
        _say(console, line)
    mine, theirs = ({t.target.name: t for t in plan.targets} for plan in (first, second))
    moved = [name for name in {**mine, **theirs} if _rank(mine.get(name)) != _rank(theirs.get(name))]
    if moved:
        _say(console, f"\nranks that differ: {len(moved)} of {len({**mine, **theirs})} targets")
        print_grid(_cells(mine, theirs), console)
    same = {name: (t, theirs[name]) for name, t in mine.items() if name in theirs and name not in moved}
    told = [*_counts(same), *_starts(same)]
    for line in told:
        _say(console, line)
    known = {*moved, *(name for name, pair in same.items() if _kind(*pair) != (None, None) or _gap(*pair) is not None)}
    rest = [line for line in lines if not line.startswith("method: ") and line.partition(": ")[0] not in known]
    for line in rest[:_MOST_LINES]:
        _say(console, line)
    if len(rest) > _MOST_LINES:
        _say(console, f"and {len(rest) - _MOST_LINES} more targets differ")
    return True


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _options(first: Plan, second: Plan) -> list[str]:
    if first.method != second.method:
        return [f"method: {first.method} | {second.method}"]
    keys = sorted({*first.options, *second.options})
    pairs = [(key, first.options.get(key), second.options.get(key)) for key in keys]
    return [f"method.{key}: {_value(one)} | {_value(two)}" for key, one, two in pairs if one != two]


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


def _rank(plan: TargetPlan | None) -> int:
    return 0 if plan is None else plan.decision.rank


def _cells(
    mine: Mapping[str, TargetPlan], theirs: Mapping[str, TargetPlan]
) -> dict[tuple[int | None, str], Sequence[str]]:
    cells: dict[tuple[int | None, str], list[str]] = {}
    for name, plan in {**theirs, **mine}.items():
        one, two = _rank(mine.get(name)), _rank(theirs.get(name))
        text = str(one) if one == two else f"{one or '–'} | {two or '–'}"
        cells.setdefault((plan.target.layer, plan.target.role), []).append(text)
    return dict(cells)


def _kind(one: TargetPlan, two: TargetPlan) -> tuple[str | None, str | None]:
    """Tell how the scales and the trained factors of two targets differ."""
    scale = None if one.scale == two.scale else f"scale {one.scale:g} | {two.scale:g}"
    trains = [" ".join(sorted(plan.trainable)) for plan in (one, two)]
    return scale, None if one.trainable == two.trainable else f"trains {trains[0]} | {trains[1]}"


def _counts(same: Mapping[str, tuple[TargetPlan, TargetPlan]]) -> list[str]:
    words = Counter(word for pair in same.values() for word in _kind(*pair) if word is not None)
    return [f"{word}: at {_targets(count)}" for word, count in words.items()]


def _starts(same: Mapping[str, tuple[TargetPlan, TargetPlan]]) -> list[str]:
    gaps = sorted(gap for pair in same.values() if (gap := _gap(*pair)) is not None)
    if not gaps:
        return []
    if gaps[-1] == 0:
        return [f"changed starts: {_targets(len(gaps))} of the same rank, with other factors of the same change"]
    reach = " to ".join(dict.fromkeys(f"{gap:.1e}" for gap in (gaps[0], gaps[-1])))
    return [f"changed starts: {_targets(len(gaps))} of the same rank, relative difference {reach}"]


def _gap(one: TargetPlan, two: TargetPlan) -> float | None:
    """Measure how far apart two starts are, relative to the second; None when they are equal or of other shapes."""
    a, b = one.init, two.init
    if a.shape != b.shape or (torch.equal(a.B, b.B) and torch.equal(a.A, b.A)):
        return None
    return _size(a.minus(b)) / max(_size(b), 1e-30)


def _size(change: LowRank) -> float:
    return float(change.norm_squared().sqrt())


def _targets(count: int) -> str:
    return "1 target" if count == 1 else f"{count} targets"
