"""FARSS by its equations, one entry and one direction at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def importance(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> float:
    """Eq. 8."""
    return float(torch.trace(sigma_delta @ W @ sigma_h @ W.T)) / (W.shape[0] * W.shape[1])


def kronecker_form(dW: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> float:
    """vec(dW)ᵀ (Σ_h ⊗ Σ_δ) vec(dW), columns stacked (eqs. 3, 6)."""
    vec = dW.T.reshape(-1)
    return float(vec @ torch.kron(sigma_h, sigma_delta) @ vec)


def scores(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> list[float]:
    """Eq. 15, direction by direction."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    found = []
    for i in range(len(S)):
        lam = float(Vh[i] @ sigma_h @ Vh[i])
        gam = float(U[:, i] @ sigma_delta @ U[:, i])
        found.append(float(S[i]) ** 2 * lam * gam)
    return found


def paper_ranks(I: list[float], r_avg: int, r_min: int, r_max: int) -> list[int]:  # noqa: E741
    """Eqs. 9-12."""
    omega = [1 / (value / sum(I) + 1e-12) for value in I]
    return [min(max(round(r_avg * len(I) * w / sum(omega)), r_min), r_max) for w in omega]


def factors(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor, r: int, *, shallow: bool) -> Tensor:
    """B A of eqs. 16 and 17, as a sum of chosen rank-one parts."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    s = scores(W, sigma_h, sigma_delta)
    order = sorted(range(len(s)), key=lambda i: -s[i])
    chosen = order[-r:] if shallow else order[:r]
    return sum((S[i] * torch.outer(U[:, i], Vh[i]) for i in chosen), torch.zeros_like(W))
