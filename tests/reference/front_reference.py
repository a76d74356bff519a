"""Slow, obvious versions of dominance, hypervolume and the matched score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Place = tuple[float, float]


def dominates(p: Place, q: Place) -> bool:
    """Tell whether p is at least as good on both axes and better on one."""
    return p[0] >= q[0] and p[1] <= q[1] and p != q


def pareto_brute(places: Sequence[Place]) -> list[bool]:
    """Compare every place with every other."""
    return [not any(dominates(other, place) for other in places) for place in places]


def hypervolume_by_counting(places: Sequence[tuple[int, int]], reference: tuple[int, int]) -> int:
    """Count the unit squares that some place of a whole-number grid dominates."""
    count = 0
    for x in range(reference[0], max((p[0] for p in places), default=0)):
        for y in range(min((p[1] for p in places), default=0), reference[1]):
            count += any(p[0] >= x + 1 and p[1] <= y for p in places)
    return count


def hypervolume_by_inclusion(places: Sequence[Place], reference: Place) -> float:
    """Add and subtract the areas of all intersections of rectangles."""
    total = 0.0
    for size in range(1, len(places) + 1):
        for some in combinations(places, size):
            wide = min(p[0] for p in some) - reference[0]
            high = reference[1] - max(p[1] for p in some)
            total += (-1) ** (size + 1) * max(wide, 0.0) * max(high, 0.0)
    return total


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
