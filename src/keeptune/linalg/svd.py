"""Singular value decompositions that never form the large matrix they decompose."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["projected_svd"]


def projected_svd(W: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``W U Uᵀ`` from the thin SVD of ``W U``.

    With ``W U = P S Rᵀ`` (m x r), ``W U Uᵀ = P S (U R)ᵀ``: cost m n r + m r² instead of m n².
    Laws: ``P diag(S) Vᵀ == W U Uᵀ``; ``PᵀP == VᵀV == I`` where S > 0; the rows of Vᵀ lie in span(U).

    Args:
        W: ``(m, n)``.
        U: ``(n, r)``, orthonormal columns.

    Returns:
        ``P (m, k)``, ``S (k,)`` descending, ``Vᵀ (k, n)`` with k = min(m, r), in the dtype of U.
    """
    P, S, Rh = torch.linalg.svd(W.to(U.dtype) @ U, full_matrices=False)
    return P, S, Rh @ U.T
