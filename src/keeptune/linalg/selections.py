"""Selections of nodes by votes of samples, and how many rows two selections have in common.

A min-max normalisation per sample and layer, or over a whole sample, keeps the order of the scores and so changes no
vote; none is made. Of equal scores, and of equal counts, the lowest index comes first.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

Rows = tuple[tuple[int, ...], ...]


def quota(q: float, nodes: int) -> int:
    """Returns q per cent of some nodes, rounded down: ``floor(q / 100 * nodes)``.

    Exact, with q the decimal number as it is written. LoKI's released code multiplies floats, which may lose one:
    ``int(29 / 100 * 100)`` is 28.

    Laws: between 0 and ``nodes`` for q in [0, 100]; ``quota(100, n) == n``; never decreases with q or ``nodes``.

    >>> quota(29, 100), quota(0.7, 1000), quota(10, 4096)
    (29, 7, 409)
    """
    return math.floor(Fraction(str(q)) * nodes / 100)


def lowest(scores: Tensor, k: int) -> Tensor:
    """Returns a mask of the k smallest of scores ``(..., D)`` along the last dimension.

    Laws: k marks each; what is marked is never larger than what is not; any increasing function of the scores marks
    the same.

    Raises:
        ValueError: A score is NaN, or k is not 0 to D.
    """
    if not 0 <= k <= scores.shape[-1]:
        raise ValueError(f"lowest: got k {k}, wanted 0 to {scores.shape[-1]}")
    if bool(scores.isnan().any()):
        raise ValueError("lowest: a score is NaN")
    if k == 0 or not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    border = scores.kthvalue(k, dim=-1, keepdim=True).values
    below, at = scores < border, scores == border
    left = k - below.sum(dim=-1, keepdim=True)
    return below | (at & (at.cumsum(dim=-1) <= left))


def count_votes(chunks: Iterable[Tensor], k: int, *, whole: bool = False, highest: bool = False) -> Tensor:
    """Returns how often each node is among the k lowest of a sample, ``(L, D)``, int64 (LoKI, eqs. 7 and 8).

    Laws: the order of samples and how they are split into chunks change nothing; the counts of a layer sum to k times
    the samples, or those of all layers do where ``whole``; multiplying a sample's layer by a positive number or adding
    one to it changes nothing (``whole``: the same to all its layers).

    Args:
        chunks: Scores, ``(n, L, D)`` each.
        k: How many each sample votes for, in each layer or, where ``whole``, in all.
        whole: Rank the nodes of all layers together.
        highest: Vote for the highest.

    Raises:
        ValueError: A score is NaN, k is out of range, or there is no chunk.
    """
    counts: Tensor | None = None
    for chunk in chunks:
        scores = -chunk if highest else chunk
        marked = lowest(scores.flatten(1), k).view(scores.shape) if whole else lowest(scores, k)
        counts = marked.sum(dim=0) if counts is None else counts + marked.sum(dim=0)
    if counts is None:
        raise ValueError("count_votes: no sample")
    return counts


def most_voted(counts: Tensor, k: int, *, whole: bool = False) -> Rows:
    """Returns the k nodes with most of the votes ``(L, D)``, of each layer or of all, ascending by layer (LoKI, eq. 9).

    Laws: no node twice; k of each layer, or k in all where ``whole`` (a layer may get none); no node left out has more
    votes than one that is taken, in its layer or in all.
    """
    marked = lowest(-counts.flatten(), k).view(counts.shape) if whole else lowest(-counts, k)
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in marked)


def voted(chunks: Iterable[Tensor], k: int, *, whole: bool = False, highest: bool = False) -> tuple[Rows, Tensor]:
    """Returns the k nodes with most votes where each sample has k, and the votes ``(L, D)`` (LoKI, eqs. 7 to 9)."""
    counts = count_votes(chunks, k, whole=whole, highest=highest)
    return most_voted(counts, k, whole=whole), counts


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many rows two selections of the same nodes have, how many are common, and how many would be by chance."""

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
        """The average of ``share`` at random."""
        return self._of(self.expected)

    def _of(self, common: float) -> float | None:
        rows = self.first + self.second
        return 2 * common / rows if rows else None


def overlaps(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], nodes: int) -> list[Overlap]:
    """Returns the overlap of two selections in each layer, of as many nodes D each.

    Laws: symmetric; chance is ``|A| |B| / D``, which is all of them where either takes every node.

    Raises:
        ValueError: The selections are of other layers, or a row is none of the nodes.
    """
    if len(first) != len(second):
        raise ValueError(f"overlaps: got {len(first)} and {len(second)} layers, wanted the same")
    layers = []
    for one, other in zip(first, second, strict=True):
        a, b = frozenset(one), frozenset(other)
        if not a | b <= frozenset(range(nodes)):
            raise ValueError(f"overlaps: got row {max(a | b)} or below 0, wanted 0 to {nodes - 1}")
        layers.append(Overlap(len(a), len(b), len(a & b), float(Fraction(len(a) * len(b), nodes))))
    return layers


def overlap_of(layers: Sequence[Overlap]) -> Overlap:
    """Returns the overlap of whole selections; chance draws as many rows in each layer."""
    return Overlap(
        sum(layer.first for layer in layers),
        sum(layer.second for layer in layers),
        sum(layer.common for layer in layers),
        math.fsum(layer.expected for layer in layers),
    )
