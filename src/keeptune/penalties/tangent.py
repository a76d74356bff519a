"""LaLoRA's penalties: quadratic forms in the factors around the values they start from.

    y = W x + s B A x,   dA = A - A_0,   dB = B - B_0
    diag        q = sum(F_AA ∘ dA²) + sum(F_BB ∘ dB²)                                          (1)
    b-kfac      q = s² [tr(P dA Ω dAᵀ) + tr(Γ dB Q dBᵀ)],   P = B_0ᵀΓB_0,  Q = A_0ΩA_0ᵀ         (2)
    b-tri-kfac  q = tr(Γ E Ω Eᵀ),   E = s (B_0 dA + dB A_0) = s L R,  L = [B_0, dB], R = [dA; A_0]  (3)
                  = [vec dA, vec dB]ᵀ Jᵀ(Γ ⊗ Ω)J [vec dA, vec dB],   J = d vec(s B A) / d (vec A, vec B)
    dq/dA = 2 s² P dA Ω,   dq/dB = 2 s² Γ dB Q                  of (2)                          (4)
    dq/dA = 2 s² B_0ᵀΓL (RΩ),   dq/dB = 2 s² ΓL (RΩA_0ᵀ)        of (3)                          (5)

(3) is (2) and what couples A with B; it is a Gram form of Γ ⊗ Ω, so positive semi-definite. Coupling does not go beyond
the pair: a precision cut down to the three diagonals of a chain of blocks need not be.

At B_0 = 0 all of F_AA, P and the coupling are zero: (3) is (2), and neither sees A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.symmetric import Identity, PsdMatrix

__all__ = ["BlockKronecker", "CoupledKronecker", "Diagonal", "block_kronecker", "coupled_kronecker"]


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal:
    """``w q`` of (1).

    Laws, for every form here: the value is that of the dense matrix; it is 0, and so is its gradient, at the start.

    Args:
        fisher: ``F_BB`` in the place of B, ``F_AA`` in that of A; not negative.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``.
    """

    fisher: LowRank
    weight: float | Tensor
    start: LowRank

    def value(self, delta: LowRank) -> Tensor:
        """Compute (1)."""
        return self.value_and_grad(delta)[0]

    def value_and_grad(self, delta: LowRank) -> tuple[Tensor, LowRank]:
        """Compute (1); the gradients are ``2 w F ∘ d``."""
        dB, dA = delta.B - self.start.B, delta.A - self.start.A
        to_B, to_A = self.fisher.B * dB, self.fisher.A * dA
        value = self.weight * ((to_B * dB).sum() + (to_A * dA).sum())
        return value, LowRank(B=2 * self.weight * to_B, A=2 * self.weight * to_A)


@dataclass(frozen=True, slots=True, eq=False)
class BlockKronecker:
    """``w q`` of (2). Make it with :func:`block_kronecker`.

    Args:
        Omega: Ω.
        Gamma: Γ.
        P: ``(r, r)``.
        Q: ``(r, r)``.
        scale: s.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``.
    """

    Omega: PsdMatrix
    Gamma: PsdMatrix
    P: Tensor
    Q: Tensor
    scale: float
    weight: float | Tensor
    start: LowRank

    def value(self, delta: LowRank) -> Tensor:
        """Compute (2)."""
        return self.value_and_grad(delta)[0]

    def value_and_grad(self, delta: LowRank) -> tuple[Tensor, LowRank]:
        """Compute (2) and (4)."""
        dB, dA = delta.B - self.start.B, delta.A - self.start.A
        to_B, to_A = self.Gamma.apply(dB) @ self.Q, self.P @ self.Omega.apply(dA.T).T
        w = self.weight * self.scale**2
        return w * ((to_B * dB).sum() + (to_A * dA).sum()), LowRank(B=2 * w * to_B, A=2 * w * to_A)


@dataclass(frozen=True, slots=True, eq=False)
class CoupledKronecker:
    """``w q`` of (3). Make it with :func:`coupled_kronecker`.

    Args:
        Omega: Ω.
        Gamma: Γ.
        GB: ``Γ B_0``, ``(m, r)``.
        AO: ``A_0 Ω``, ``(r, n)``.
        scale: s.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``.
    """

    Omega: PsdMatrix
    Gamma: PsdMatrix
    GB: Tensor
    AO: Tensor
    scale: float
    weight: float | Tensor
    start: LowRank

    def value(self, delta: LowRank) -> Tensor:
        """Compute (3)."""
        return self.value_and_grad(delta)[0]

    def value_and_grad(self, delta: LowRank) -> tuple[Tensor, LowRank]:
        """Compute (3) and (5)."""
        B_0, A_0 = self.start.B, self.start.A
        dB, dA = delta.B - B_0, delta.A - A_0
        L, GL = torch.cat([B_0, dB], dim=1), torch.cat([self.GB, self.Gamma.apply(dB)], dim=1)
        R, RO = torch.cat([dA, A_0]), torch.cat([self.Omega.apply(dA.T).T, self.AO])
        LGL, RORt, r = L.T @ GL, RO @ R.T, delta.rank
        w = self.weight * self.scale**2
        # The first r rows of LᵀΓL are B_0ᵀΓL; the last r columns of RΩRᵀ are RΩA_0ᵀ.
        return w * (LGL * RORt).sum(), LowRank(B=2 * w * (GL @ RORt[:, r:]), A=2 * w * (LGL[:r] @ RO))


def block_kronecker(
    Omega: PsdMatrix, Gamma: PsdMatrix, *, scale: float, weight: float | Tensor, start: LowRank
) -> BlockKronecker:
    """Make (2), with what does not change in training formed once.

    Args:
        Omega: Ω.
        Gamma: Γ.
        scale: s.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``, in the dtype of the factors.

    Returns:
        The penalty.
    """
    P, Q = start.B.T @ Gamma.apply(start.B), start.A @ Omega.apply(start.A.T)
    return BlockKronecker(_seen(Omega, start), Gamma, P, Q, scale, weight, start)


def coupled_kronecker(
    Omega: PsdMatrix, Gamma: PsdMatrix, *, scale: float, weight: float | Tensor, start: LowRank
) -> CoupledKronecker:
    """Make (3), with what does not change in training formed once.

    Args:
        Omega: Ω.
        Gamma: Γ.
        scale: s.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``, in the dtype of the factors.

    Returns:
        The penalty.
    """
    GB, AO = Gamma.apply(start.B), Omega.apply(start.A.T).T
    return CoupledKronecker(_seen(Omega, start), Gamma, GB, AO, scale, weight, start)


def _seen(Omega: PsdMatrix, start: LowRank) -> PsdMatrix:
    """Leave ``dA Ω`` out where nothing is multiplied with it but zeros: at B_0 = 0."""
    return Omega if bool(start.B.any()) else Identity(Omega.size, start.A.new_zeros(()))
