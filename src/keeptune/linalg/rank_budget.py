"""Whole ranks from real weights: clipped shares, and shares that sum to a budget exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence


def clipped_shares(weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Returns ``clip(round(total w_i / Σ w), low_i, high_i)`` of positive w; their sum is from Σ low to Σ high."""
    scale = total / math.fsum(weights)
    return [min(max(round(scale * w), a), b) for w, a, b in zip(weights, low, high, strict=True)]


def exact_shares(weights: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Returns ranks that sum to a total: what a bound takes or adds goes to those that are not at one.

    The real shares are ``clip(θ w_i, low_i, high_i)``, w > 0, with the θ at which they sum to the total, rounded down;
    the units left over go to the largest remainders (the first of equal ones).
    Laws: the ranks sum to the total; each is within its bounds; where bounds are equal, a larger weight never
    gets less.

    Raises:
        ValueError: The total is not between Σ low and Σ high.
    """
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"exact_shares: got total {total}, wanted {sum(low)} to {sum(high)}")
    bounds = list(zip(weights, low, high, strict=True))

    def shares(theta: float) -> list[float]:
        return [min(max(theta * w, float(a)), float(b)) for w, a, b in bounds]

    # θ lies between two of the points where a share meets a bound; between them the sum is linear in θ.
    knots = sorted({0.0} | {bound / w for w, a, b in bounds for bound in (a, b)})
    above = next(index for index, knot in enumerate(knots) if math.fsum(shares(knot)) >= total - 1e-9)
    if above == 0:
        real = shares(knots[0])
    else:
        left, right = math.fsum(shares(knots[above - 1])), math.fsum(shares(knots[above]))
        step = (total - left) / (right - left) if right > left else 0.0
        real = shares(knots[above - 1] + step * (knots[above] - knots[above - 1]))
    # 1e-9: a share of 3 - 1e-16 is 3.
    ranks = [min(max(math.floor(x + 1e-9), a), b) for x, (_, a, b) in zip(real, bounds, strict=True)]
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i] - real[i], i))
    while sum(ranks) < total:
        for i in order:
            if sum(ranks) < total and ranks[i] < high[i]:
                ranks[i] += 1
    return ranks
