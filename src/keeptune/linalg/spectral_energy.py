"""How much of a matrix its largest singular values hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["top_energy"]


def top_energy(W: Tensor, k: int) -> float:
    """Give the share of the energy of ``W`` that its k largest singular values hold (FARSS Fig. 1).

    ``E_k(W) = (s₁² + ... + s_k²) / (s₁² + s₂² + ...)``, from the eigenvalues s² of the smaller of ``W Wᵀ`` and
    ``Wᵀ W``, in float64.
    Laws: ``0 < E_k <= 1``; E_k grows with k; ``E_k == 1`` from the rank of W on; ``E_k(c W) == E_k(W)``;
    ``E_k(Wᵀ) == E_k(W)``.

    Args:
        W: ``(m, n)``, finite.
        k: How many singular values, at least 1; more than there are count as all.

    Returns:
        The share; NaN for a matrix of zeros.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"top_energy: got k = {k}, wanted at least 1")
    W = W.double()  # squares of float32 numbers stay in its range
    if not W.any():
        return math.nan
    small = W if W.shape[0] <= W.shape[1] else W.T
    squares = torch.linalg.eigvalsh(small @ small.T).clamp_min(0)  # ascending
    return float(squares[-k:].sum() / squares.sum())
