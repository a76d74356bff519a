"""Gram matrices X^T X of tall X: only the upper blocks are multiplied, sums are kept in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKS = 8
_SMALL = 256


def add_gram(total: Tensor, X: Tensor) -> None:
    """Adds ``Xᵀ X`` of rows X ``(N, n)`` to the upper blocks of a running sum ``(n, n)``, float64, in place.

    The product of each batch is formed in float32 and summed in float64, so a long sum loses nothing.
    Only blocks on or above the diagonal are formed: (b + 1) / 2b of the multiplications for b blocks.
    Law: ``symmetric(total) == Xᵀ X`` after one call on zeros.
    """
    X = X.float()
    n = X.shape[1]
    step = n if n <= _SMALL else -(-n // _BLOCKS)
    for start in range(0, n, step):
        stop = min(start + step, n)
        total[start:stop, start:] += X[:, start:stop].T @ X[:, start:]


def symmetric(total: Tensor) -> Tensor:
    """Returns the symmetric matrix ``(n, n)`` with the upper triangle of another."""
    upper = torch.triu(total)
    return upper.add_(torch.triu(total, 1).T)
