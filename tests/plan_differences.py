"""Where two plans differ, a line each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan, TargetPlan


def differences(first: Plan, second: Plan) -> list[str]:
    """Returns one line per difference, with the first plan on the left of each bar; none for equal plans."""
    lines, plans = [], (first, second)
    if first.method != second.method or dict(first.options) != dict(second.options):
        lines.append("method: " + " | ".join(f"{plan.method} {dict(plan.options)}" for plan in plans))
    if dict(first.training) != dict(second.training):
        lines.append("training: " + " | ".join(str(dict(plan.training)) for plan in plans))
    terms = [[f"{p.name} {dict(p.options)}" for p in plan.penalties] for plan in plans]
    if terms[0] != terms[1]:
        lines.append("penalties: " + " | ".join("; ".join(term) or "none" for term in terms))
    elif not all(_equal(a.tensors, b.tensors) for a, b in zip(first.penalties, second.penalties, strict=True)):
        lines.append("penalties: same options, another curvature or weight")
    mine, theirs = ({t.target.name: t for t in plan.targets} for plan in plans)
    for name in sorted(mine.keys() | theirs.keys()):
        line = _difference(mine.get(name), theirs.get(name))
        lines += [f"{name}: {line}"] if line else []
    return lines


def _difference(a: TargetPlan | None, b: TargetPlan | None) -> str:
    if a is None or b is None:
        return f"only in the {'second' if a is None else 'first'} plan"
    if a.init.shape != b.init.shape:
        return " | ".join(" x ".join(map(str, t.init.shape)) for t in (a, b))
    if (a.decision, a.scale, a.trainable) != (b.decision, b.scale, b.trainable):
        trains = " | ".join(" ".join(sorted(t.trainable)) for t in (a, b))
        others = len(set(a.decision.rows or ()) ^ set(b.decision.rows or ()))
        ranks = f"rank {a.decision.rank} | {b.decision.rank}, scale {a.scale} | {b.scale}, trains {trains}"
        return ranks + (f", {others} rows of only one" if others else "")
    if (gap := relative_gap(a.init, b.init)) is not None:
        return f"same rank, starting change differs by {gap:.2e} (relative)"
    if not _equal(a.vectors, b.vectors):
        return f"same factors, another start of {', '.join(sorted({*a.vectors, *b.vectors}))}"
    return ""


def relative_gap(a: LowRank, b: LowRank) -> float | None:
    """Returns the distance of two changes, relative to the second; None when their factors are equal."""
    if torch.equal(a.B, b.B) and torch.equal(a.A, b.A):
        return None
    return float(a.minus(b).norm_squared().sqrt() / b.norm_squared().sqrt().clamp_min(1e-30))


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
