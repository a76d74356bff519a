"""Two plans side by side: options, ranks by layer and role, and how many starts changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console

from keeptune.core.plan import Plan, TargetPlan
from keeptune.core.plan_differences import differences, relative_gap
from keeptune.report.tables.terminal import print_grid, say

_MOST_LINES = 6


def print_diff(first: Plan, second: Plan, console: Console) -> bool:
    """Prints where two plans differ, the first on the left; returns whether they do, without a word when equal."""
    lines = differences(first, second)
    if not lines:
        return False
    for line in _options(first, second):
        say(console, line)
    mine, theirs = ({t.target.name: t for t in plan.targets} for plan in (first, second))
    moved = [name for name in {**mine, **theirs} if _rank(mine.get(name)) != _rank(theirs.get(name))]
    if moved:
        say(console, f"\nranks that differ: {len(moved)} of {len({**mine, **theirs})} targets")
        print_grid(_cells(mine, theirs), console)
    same = {name: (t, theirs[name]) for name, t in mine.items() if name in theirs and name not in moved}
    for line in [*_counts(same), *_starts(same)]:
        say(console, line)
    known = {*moved, *(name for name, pair in same.items() if _kinds(*pair) or _gap(*pair) is not None)}
    rest = [line for line in lines if not line.startswith("method: ") and line.partition(": ")[0] not in known]
    for line in rest[:_MOST_LINES]:
        say(console, line)
    if len(rest) > _MOST_LINES:
        say(console, f"and {len(rest) - _MOST_LINES} more targets differ")
    return True


def _options(first: Plan, second: Plan) -> list[str]:
    if first.method != second.method:
        return [f"method: {first.method} | {second.method}"]
    keys = sorted({*first.options, *second.options})
    pairs = [(key, first.options.get(key), second.options.get(key)) for key in keys]
    return [f"method.{key}: {_option(one)} | {_option(two)}" for key, one, two in pairs if one != two]


def _option(value: object) -> str:
    return "null" if value is None else str(value)


def _rank(plan: TargetPlan | None) -> int:
    return 0 if plan is None else plan.decision.rank


def _cells(
    mine: Mapping[str, TargetPlan], theirs: Mapping[str, TargetPlan]
) -> Mapping[tuple[int | None, str], Sequence[str]]:
    cells: dict[tuple[int | None, str], list[str]] = {}
    for name, plan in {**theirs, **mine}.items():
        one, two = _rank(mine.get(name)), _rank(theirs.get(name))
        text = str(one) if one == two else f"{one or '–'} | {two or '–'}"
        cells.setdefault((plan.target.layer, plan.target.role), []).append(text)
    return cells


def _kinds(one: TargetPlan, two: TargetPlan) -> list[str]:
    """Returns how the scales and the trained factors of two targets differ."""
    kinds = [] if one.scale == two.scale else [f"scale {one.scale:g} | {two.scale:g}"]
    if one.trainable != two.trainable:
        trained = [" ".join(sorted(plan.trainable)) for plan in (one, two)]
        kinds.append(f"trains {trained[0]} | {trained[1]}")
    return kinds


def _counts(same: Mapping[str, tuple[TargetPlan, TargetPlan]]) -> list[str]:
    kinds = Counter(kind for pair in same.values() for kind in _kinds(*pair))
    return [f"{kind}: at {_targets(count)}" for kind, count in kinds.items()]


def _starts(same: Mapping[str, tuple[TargetPlan, TargetPlan]]) -> list[str]:
    gaps = sorted(gap for pair in same.values() if (gap := _gap(*pair)) is not None)
    if not gaps:
        return []
    if gaps[-1] == 0:
        return [f"changed starts: {_targets(len(gaps))} of the same rank, with other factors of the same change"]
    reach = " to ".join(dict.fromkeys(f"{gap:.1e}" for gap in (gaps[0], gaps[-1])))
    return [f"changed starts: {_targets(len(gaps))} of the same rank, relative difference {reach}"]


def _gap(one: TargetPlan, two: TargetPlan) -> float | None:
    return relative_gap(one.init, two.init) if one.init.shape == two.init.shape else None


def _targets(count: int) -> str:
    return "1 target" if count == 1 else f"{count} targets"
