"""Gram matrices X^T X of tall X: only the upper blocks are multiplied, sums are kept in float64."""

import torch
from torch import Tensor

_BLOCKS = 8
_SMALL = 256


def add_gram(total: Tensor, X: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Adds ``Xᵀ X`` of rows X ``(N, n)`` to the upper blocks of a running sum ``(n, n)``, float64, in place.

    The product of each batch is formed in ``dtype`` and summed in float64, so a long sum loses nothing. In float32 a
    product is off by 1e-7 of the largest eigenvalue, below which no small one can be told: singular values of X down to
    3e-4 of the largest. In float64 it is 1e-8.
    Only blocks on or above the diagonal are formed: (b + 1) / 2b of the multiplications for b blocks.
    Law: ``symmetric(total) == Xᵀ X`` after one call on zeros.
    """
    X = X.to(dtype)
    n = X.shape[1]
    step = n if n <= _SMALL else -(-n // _BLOCKS)
    for start in range(0, n, step):
        stop = min(start + step, n)
        total[start:stop, start:] += X[:, start:stop].T @ X[:, start:]


def symmetric(total: Tensor) -> Tensor:
    """Returns the symmetric matrix ``(n, n)`` with the upper triangle of another."""
    upper = torch.triu(total)
    return upper.add_(torch.triu(total, 1).T)
