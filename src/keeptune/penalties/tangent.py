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

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.symmetric import Identity, PsdMatrix
from keeptune.penalties.base import Form


def diagonal(fisher: LowRank, weight: float | Tensor, start: LowRank) -> Form:
    """Returns ``w q`` of (1); the gradients are ``2 w F ∘ d``.

    Laws, for every form here: the value is that of the dense matrix; it is 0, and so is its gradient, at the start.

    Args:
        fisher: ``F_BB`` in the place of B, ``F_AA`` in that of A; not negative.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``, in the dtype of the factors.
    """

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        dB, dA = delta.B - start.B, delta.A - start.A
        to_B, to_A = fisher.B * dB, fisher.A * dA
        value = weight * ((to_B * dB).sum() + (to_A * dA).sum())
        return value, LowRank(B=2 * weight * to_B, A=2 * weight * to_A)

    return form


def block_kronecker(
    Omega: PsdMatrix, Gamma: PsdMatrix, *, scale: float, weight: float | Tensor, start: LowRank
) -> Form:
    """Returns ``w q`` of (2) and its gradient (4), with what does not change in training formed once."""
    P, Q = start.B.T @ Gamma.apply(start.B), start.A @ Omega.apply(start.A.T)
    Omega, w = _seen(Omega, start), weight * scale**2

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        dB, dA = delta.B - start.B, delta.A - start.A
        to_B, to_A = Gamma.apply(dB) @ Q, P @ Omega.apply(dA.T).T
        return w * ((to_B * dB).sum() + (to_A * dA).sum()), LowRank(B=2 * w * to_B, A=2 * w * to_A)

    return form


def coupled_kronecker(
    Omega: PsdMatrix, Gamma: PsdMatrix, *, scale: float, weight: float | Tensor, start: LowRank
) -> Form:
    """Returns ``w q`` of (3) and its gradient (5), with what does not change in training formed once."""
    B_0, A_0 = start.B, start.A
    GB, AO = Gamma.apply(B_0), Omega.apply(A_0.T).T
    Omega, w = _seen(Omega, start), weight * scale**2

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        dB, dA, r = delta.B - B_0, delta.A - A_0, delta.rank
        L, GL = torch.cat([B_0, dB], dim=1), torch.cat([GB, Gamma.apply(dB)], dim=1)
        R, RO = torch.cat([dA, A_0]), torch.cat([Omega.apply(dA.T).T, AO])
        LGL, RORt = L.T @ GL, RO @ R.T
        # The first r rows of LᵀΓL are B_0ᵀΓL; the last r columns of RΩRᵀ are RΩA_0ᵀ.
        return w * (LGL * RORt).sum(), LowRank(B=2 * w * (GL @ RORt[:, r:]), A=2 * w * (LGL[:r] @ RO))

    return form


def _seen(Omega: PsdMatrix, start: LowRank) -> PsdMatrix:
    """Leaves ``dA Ω`` out where nothing is multiplied with it but zeros: at B_0 = 0."""
    return Omega if bool(start.B.any()) else Identity(Omega.size, start.A.new_zeros(()))
