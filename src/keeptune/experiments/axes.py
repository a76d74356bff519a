"""The two axes of a comparison: what a run learned and what it forgot, from the scores of its benchmarks.

With b_j and a_j the scores of benchmark j before and after fine-tuning, T the task benchmarks of the axis and K its
knowledge benchmarks, every benchmark counting the same,

    learned   = mean over T of a_j          (shares)   or  mean over T of -a_j        (nats per token)        (1)
    forgotten = mean over K of b_j - a_j    (shares)   or  mean over K of a_j - b_j   (nats per token)        (2)

More learned is better and less forgotten is better in both units. The item interval of a value is the mean of its
benchmarks' own. The benchmarks of an axis are the same for all runs; a run that lacks a score of one of them has no
value on the axis, never one over the benchmarks left.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from keeptune.core.errors import RecipeError, need_known
from keeptune.core.intervals import lower_is_better

Unit = Literal["share", "nats"]
Role = Literal["task", "knowledge"]
# Differences of shares that are equal (0.8 - 0.7 and 0.5 - 0.4) differ in their last bits; a tie must stay one.
DIGITS: Final = 12
SIDES: Final[Mapping[str, Role]] = {"learned": "task", "forgotten": "knowledge"}


@dataclass(frozen=True, slots=True)
class Axis:
    """The benchmarks of one axis: ``"task"`` is what is learned, ``"knowledge"`` what is forgotten."""

    role: Role
    names: tuple[str, ...]
    unit: Unit


@dataclass(frozen=True, slots=True)
class Value:
    """A run's value on an axis, with its 95% interval over items; where it has no number, ``why`` says why."""

    number: float | None
    why: str = ""
    interval: tuple[float, float] | None = None


def axes_of(
    benchmarks: Sequence[Mapping[str, Any]],
    learned: Sequence[str] | None = None,
    forgotten: Sequence[str] | None = None,
) -> dict[str, Axis]:
    """Returns the axes of a comparison by side, of benchmarks with ``name``, ``role`` and ``metric``.

    Unless named, an axis has the benchmarks of its role that are shares; where there are none, those in nats.

    Raises:
        RecipeError: A role has no benchmark, a name is unknown or of another role, or those named have two units.
    """
    return {side: _axis(benchmarks, side, named) for side, named in (("learned", learned), ("forgotten", forgotten))}


def _axis(benchmarks: Sequence[Mapping[str, Any]], side: str, named: Sequence[str] | None) -> Axis:
    role, key = SIDES[side], f"compare.{side}"
    units = {b["name"]: unit_of(b["metric"]) for b in benchmarks if b["role"] == role}
    if not units:
        raise RecipeError(
            "evaluate",
            got=f"no benchmark with role: {role}",
            wanted="at least one task and one knowledge benchmark: a comparison sets learning against forgetting",
            next_step=f"Add one with role: {role}.",
        )
    if named is None:
        unit: Unit = "share" if "share" in units.values() else "nats"
        return Axis(role, tuple(name for name in units if units[name] == unit), unit)
    for name in named or ("an empty list",):
        need_known(name, units, key, f"names of {role} benchmarks in `evaluate`")
    if len({units[name] for name in named}) > 1:
        raise RecipeError(
            key,
            got=", ".join(f"{name} in {units[name]}" for name in named),
            wanted="benchmarks of one unit: a share and nats have no mean",
            next_step="Keep those of one unit.",
        )
    return Axis(role, tuple(dict.fromkeys(named)), units[named[0]])


def unit_of(metric: str) -> Unit:
    """Returns a metric's unit: ``"nats"`` where lower is better, ``"share"`` for every other."""
    return "nats" if lower_is_better(metric) else "share"


def loss_of(before: float, after: float, unit: Unit) -> float:
    """Computes how much of a benchmark was lost from a score before to one after; negative for a gain.

    >>> loss_of(0.8, 0.7, "share")
    0.1
    """
    return round(before - after if unit == "share" else after - before, DIGITS)


def value_of(benchmarks: Sequence[Mapping[str, Any]], axis: Axis) -> Value:
    """Computes what a run learned, eq. 1, or forgot, eq. 2 (negative where it gained), by the role of the axis.

    ``benchmarks`` have ``before``, ``after`` and perhaps ``interval``.
    """

    def part(before: float, after: float) -> float:
        learned = after if axis.unit == "share" else -after
        return learned if axis.role == "task" else loss_of(before, after, axis.unit)

    by_name = {b["name"]: b for b in benchmarks}
    parts, ends = [], []
    for name in axis.names:
        if name not in by_name:
            return Value(None, f"no score of {name}")
        before, after = (by_name[name][side] for side in ("before", "after"))
        for side, score in (("before", before), ("after", after)):
            if score is None or not math.isfinite(score):
                return Value(None, f"the score of {name} {side} training is missing")
        parts.append(part(before, after))
        changes = by_name[name].get("interval") or ()
        ends.append(sorted(part(before, before + change) for change in changes if change is not None))
    complete = all(len(pair) == 2 for pair in ends)
    low, high = map(_average, zip(*ends, strict=True)) if complete else (math.nan, math.nan)
    return Value(_average(parts), "", (low, high) if complete else None)


def _average(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), DIGITS)
