"""LoRA-Null step by step from the paper's equations: full SVDs, dense matrices, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def null_basis(X: Tensor, r: int) -> Tensor:
    """U_null, ``(n, r)``: the last r left singular vectors of all inputs X ``(n, N)`` (eqs. 7-9)."""
    U, _, _ = torch.linalg.svd(X.double(), full_matrices=True)
    return U[:, -r:]


def factors(W: Tensor, X: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B ``(m, r)`` and A ``(r, n)`` from the full SVD of ``W U Uᵀ`` (eqs. 10-12)."""
    U_null = null_basis(X, r)
    U, S, Vh = torch.linalg.svd(W.double() @ U_null @ U_null.T)
    root = torch.diag(S[:r].sqrt())
    return U[:, :r] @ root, root @ Vh[:r]


def leakage(A: Tensor, X: Tensor) -> float:
    """``‖A X‖ / (‖A‖ ‖X‖)``: 0 when A does not see the knowledge inputs."""
    return float((A.double() @ X.double()).norm() / (A.double().norm() * X.double().norm()))
