"""Slow, obvious versions of dominance and the matched score."""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[float, float]


def dominates(p: Place, q: Place) -> bool:
    """Tell whether p is at least as good on both axes and better on one."""
    return p[0] >= q[0] and p[1] <= q[1] and p != q


def pareto_brute(places: Sequence[Place]) -> list[bool]:
    """Compare every place with every other."""
    return [not any(dominates(other, place) for other in places) for place in places]


def forgotten_by_scan(places: Sequence[Place], score: float) -> float | None:
    """Walk along the front from place to place until the score is passed."""
    front = sorted({p for p, on in zip(places, pareto_brute(places), strict=True) if on})
    if score > front[-1][0]:
        return None
    if score <= front[0][0]:
        return front[0][1]
    for (l1, f1), (l2, f2) in zip(front, front[1:], strict=False):
        if l1 <= score <= l2:
            return f1 * (l2 - score) / (l2 - l1) + f2 * (score - l1) / (l2 - l1)
    raise AssertionError
