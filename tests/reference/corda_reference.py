"""CorDA as the paper writes it: a whole SVD of W C and an inverse of C; and PEFT's statistic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def start(W: Tensor, C: Tensor, r: int, mode: str, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``B = U_r sqrt(S_r)`` and ``A = sqrt(S_r) V_rᵀ C⁻¹``; all in one dtype."""
    W, C = W.to(dtype), C.to(dtype)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    keep = slice(0, r) if mode == "ipm" else slice(len(S) - r, None)
    root = S[keep].sqrt()
    return U[:, keep] * root, root[:, None] * (Vh[keep] @ torch.linalg.inv(C))


def peft_covariance(samples: Sequence[Tensor]) -> Tensor:
    """The mean over samples ``(T, n)`` of ``x̂ᵀ x̂``, ``x̂ = x / |max x|`` with the largest signed value."""
    total = torch.zeros(samples[0].shape[1], samples[0].shape[1], dtype=torch.float64)
    for x in samples:
        scaled = x.double() / x.double().max().abs()
        total += scaled.T @ scaled
    return total / len(samples)
