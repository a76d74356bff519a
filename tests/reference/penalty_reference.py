"""Penalties as they are defined, on dense matrices, for autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def change(B: Tensor, A: Tensor, scale: float, B_0: Tensor | None = None, A_0: Tensor | None = None) -> Tensor:
    """E = s (B A - B_0 A_0)."""
    return scale * (B @ A) if B_0 is None or A_0 is None else scale * (B @ A - B_0 @ A_0)


def quadratic(E: Tensor, Omega: Tensor, Gamma: Tensor) -> Tensor:
    """tr(Γ E Ω Eᵀ), as vec(E)ᵀ (Γ ⊗ Ω) vec(E) with rows first."""
    e = E.reshape(-1)
    return e @ torch.kron(Gamma, Omega) @ e


def ewc_lora(gradients: Tensor, batch: int, B: Tensor, A: Tensor, strength: float) -> Tensor:
    """EWC-LoRA (2602.17559) as released: of each batch the square of the mean gradient in B A, times its size."""
    squares = torch.stack([part.mean(0).square() * len(part) for part in gradients.split(batch)])
    return strength / 2 * (squares.sum(0) / len(gradients) * (B @ A).square()).sum()


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """What autograd gives."""
    return torch.autograd.grad(value, leaves)
