"""Votes of samples for nodes: quotas, the lowest or highest scores of each sample, the nodes named most often.

A min-max normalisation per sample and layer, or over a whole sample, keeps the order of the scores and so changes no
vote; none is made. Of equal scores, and of equal counts, the lowest index comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["count_votes", "lowest", "most_voted", "quota", "voted"]

Rows = tuple[tuple[int, ...], ...]


def quota(q: float, nodes: int) -> int:
    """Take q per cent of some nodes, rounded down: ``floor(q / 100 * nodes)``.

    Exact, with q the decimal number as it is written. LoKI's released code multiplies floats, which may lose one:
    ``int(29 / 100 * 100)`` is 28.

    Laws: between 0 and ``nodes`` for q in [0, 100]; ``quota(100, n) == n``; never decreases with q or ``nodes``.

    Args:
        q: Per cent.
        nodes: How many there are.

    Returns:
        How many of them.

    >>> quota(29, 100), quota(0.7, 1000), quota(10, 4096)
    (29, 7, 409)
    """
    return math.floor(Fraction(str(q)) * nodes / 100)


def lowest(scores: Tensor, k: int) -> Tensor:
    """Mark the k smallest along the last dimension; of equal ones the first.

    Laws: k marks each; what is marked is never larger than what is not; any increasing function of the scores marks
    the same.

    Args:
        scores: ``(..., D)``, without NaN.
        k: 0 to D.

    Returns:
        True where marked, ``(..., D)``.

    Raises:
        ValueError: A score is NaN, or k is out of range.
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
    """Let every sample name its k lowest nodes, and count how often each is named (LoKI, eqs. 7 and 8).

    Laws: the order of samples and how they are split into chunks change nothing; the counts of a layer sum to k times
    the samples, or those of all layers do where ``whole``; multiplying a sample's layer by a positive number or adding
    one to it changes nothing (``whole``: the same to all its layers).

    Args:
        chunks: Scores, ``(n, L, D)`` each.
        k: How many each sample names, in each layer or, where ``whole``, in all.
        whole: Rank the nodes of all layers together.
        highest: Name the highest.

    Returns:
        Counts, ``(L, D)``, int64.

    Raises:
        ValueError: A score is NaN, k is out of range, or there is no chunk.
    """
    counts: Tensor | None = None
    for chunk in chunks:
        scores = -chunk if highest else chunk
        marked = lowest(scores.flatten(1), k).view(scores.shape) if whole else lowest(scores, k)
        found = marked.sum(dim=0)
        counts = found if counts is None else counts + found
    if counts is None:
        raise ValueError("count_votes: no sample")
    return counts


def most_voted(counts: Tensor, k: int, *, whole: bool = False) -> Rows:
    """Take the k nodes that were named most often, of each layer or of all (LoKI, eq. 9).

    Laws: no node twice; k of each layer, or k in all where ``whole``; no node left out was named more often than one
    that was taken, in its layer or in all.

    Args:
        counts: ``(L, D)``.
        k: How many.
        whole: Of all layers together; a layer may get none.

    Returns:
        For each layer its nodes, ascending.

    Raises:
        ValueError: k is out of range.
    """
    marked = lowest(-counts.flatten(), k).view(counts.shape) if whole else lowest(-counts, k)
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in marked)


class Votes(NamedTuple):
    """What the samples named: rows of each layer, ascending, and how often each node was named, ``(L, D)``."""

    rows: Rows
    counts: Tensor


def voted(chunks: Iterable[Tensor], k: int, *, whole: bool = False, highest: bool = False) -> Votes:
    """Let the samples name k nodes each and take the k that were named most often (LoKI, eqs. 7 to 9).

    Args:
        chunks: Scores, ``(n, L, D)`` each.
        k: How many, of each layer or, where ``whole``, of all.
        whole: Rank the nodes of all layers together.
        highest: Name the highest.

    Returns:
        The rows and the counts.

    Raises:
        ValueError: A score is NaN, k is out of range, or there is no chunk.
    """
    counts = count_votes(chunks, k, whole=whole, highest=highest)
    return Votes(most_voted(counts, k, whole=whole), counts)
