"""KaSA's regularisers and dropped part, written down as the paper and the released code have them."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(W: Tensor, r: int) -> Tensor:
    """Stage 1: a sum over all but the r smallest singular components, one at a time."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    kept = torch.zeros_like(W, dtype=torch.float64)
    for i in range(len(S) - r):
        kept += S[i] * torch.outer(U[:, i], Vh[i])
    return kept


def orthogonality(B: Tensor, A: Tensor, form: str) -> Tensor:
    """Eq. 11, or the released code's with matrices of full size."""
    pairs = [(B.T @ B, A @ A.T), (B @ B.T, A.T @ A)]
    return sum(
        (torch.linalg.norm(G - torch.eye(len(G), dtype=G.dtype)) for G in pairs[form == "released"]), 0 * A[0, 0]
    )
