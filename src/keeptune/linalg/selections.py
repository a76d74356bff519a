"""How many rows two selections have in common, and how many chance would give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Overlap", "overlap_of", "overlaps"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """The rows that two selections of the same nodes share.

    Args:
        first: How many rows the first has.
        second: How many the second has.
        common: How many both have.
        expected: How many both would have on average if as many were drawn at random.
    """

    first: int
    second: int
    common: int
    expected: float

    @property
    def share(self) -> float | None:
        """``2 |A ∩ B| / (|A| + |B|)``: of selections of one size the share of common rows; None where there is no row.

        Laws: symmetric; in [0, 1]; 1 of a selection with itself, 0 without a common row.
        """
        return self._of(self.common)

    @property
    def chance(self) -> float | None:
        """What ``share`` would be on average at random."""
        return self._of(self.expected)

    def _of(self, common: float) -> float | None:
        rows = self.first + self.second
        return 2 * common / rows if rows else None


def overlaps(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], nodes: int) -> list[Overlap]:
    """Compare two selections layer by layer.

    Laws: symmetric; chance is ``|A| |B| / D``, which is all of them where either takes every node.

    Args:
        first: The rows of each layer, L.
        second: The rows of the same layers.
        nodes: Nodes of each layer, D.

    Returns:
        One for each layer.

    Raises:
        ValueError: The selections are of other layers, or a row is none of the nodes.
    """
    if len(first) != len(second):
        raise ValueError(f"overlaps: got {len(first)} and {len(second)} layers, wanted the same")
    found = []
    for one, other in zip(first, second, strict=True):
        a, b = frozenset(one), frozenset(other)
        if not a | b <= frozenset(range(nodes)):
            raise ValueError(f"overlaps: got row {max(a | b)} or below 0, wanted 0 to {nodes - 1}")
        found.append(Overlap(len(a), len(b), len(a & b), float(Fraction(len(a) * len(b), nodes))))
    return found


def overlap_of(layers: Sequence[Overlap]) -> Overlap:
    """Put the layers together; chance draws as many rows in each layer.

    Args:
        layers: One for each layer.

    Returns:
        The overlap of the whole selections.
    """
    return Overlap(
        sum(layer.first for layer in layers),
        sum(layer.second for layer in layers),
        sum(layer.common for layer in layers),
        math.fsum(layer.expected for layer in layers),
    )
