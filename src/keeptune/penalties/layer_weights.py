"""Weights per layer: how much more a penalty holds one block than another (L2-LoRA, eqs. 7 and 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keeptune.core.errors import PlanError

__all__ = ["check_layers", "cubic_weights"]


def cubic_weights(blocks: int, start: float = 1 / 3, end: float = 2 / 3, floor: float = 0.0) -> list[float]:
    """Compute the schedule that stands in for measured weights (L2-LoRA, eq. 8).

    1 for l < l_i; tau + (1 - tau) (1 - (l - l_i) / (l_f - l_i))³ for l_i <= l <= l_f; tau for l > l_f.

    Laws: it never rises; it is within [tau, 1]; 1 at l_i, tau at l_f.

    Args:
        blocks: L.
        start: l_i / L; the paper's is 1/3, not rounded.
        end: l_f / L; the paper's is 2/3.
        floor: tau.

    Returns:
        One weight per block, from block 0.

    >>> [round(weight, 3) for weight in cubic_weights(6)]
    [1.0, 1.0, 1.0, 0.125, 0.0, 0.0]
    """
    first, last = start * blocks, end * blocks
    weights = []
    for layer in range(blocks):
        passed = min(max((layer - first) / (last - first), 0.0), 1.0)
        weights.append(floor + (1 - floor) * (1 - passed) ** 3)
    return weights


def check_layers(layers: str | Sequence[float], where: str) -> None:
    """Check weights that are given.

    Args:
        layers: A schedule's name, or weights.
        where: The option's name.

    Raises:
        PlanError: A weight is below 0 or not finite, or there is none.
    """
    if not isinstance(layers, str) and (not layers or not all(0 <= weight < math.inf for weight in layers)):
        raise PlanError(
            where, got=str(list(layers)), wanted="one weight of 0 or more per block", next_step="Correct the list."
        )
