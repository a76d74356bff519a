"""Penalties on the weight change itself, from r x r products.

    E = s (B A - B_0 A_0)                        the change since the start               (1)
    q(E) = w tr(Γ E Ω Eᵀ)                        Ω (n, n), Γ (m, m), symmetric and PSD     (2)
    E = s L R,  L = [B - B_0, B_0],  R = [A; A - A_0]                                     (3)
    q = w s² sum((LᵀΓL) ∘ (RΩRᵀ))                                                         (4)
    dq/dB = 2 w s² ΓL (RΩAᵀ),   dq/dA = 2 w s² (BᵀΓL)(RΩ)                                  (5)

Ω = Γ = I gives ‖E‖²; Ω = E[h hᵀ], Γ = I the mean squared change of the target's output (feature drift); Γ = E[δ δᵀ]
as well, the Kronecker-factored Fisher of W, confined to changes of rank r. (3) is written in differences: in
``B A - B_0 A_0`` a start that is a large part of W would round a small change away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.symmetric import PsdMatrix
from keeptune.penalties.base import Form


def kronecker_change(
    Omega: PsdMatrix, Gamma: PsdMatrix, scale: float, weight: float | Tensor, start: LowRank | None = None
) -> Form:
    """Returns ``w tr(Γ E Ω Eᵀ)`` of the change since the start (4, 5).

    Laws: the value is that of the dense E; ``(G A, B G⁻¹)`` has the value of ``(A, B)``; it is 0, and so is its
    gradient, at the start.

    Args:
        Omega: Ω.
        Gamma: Γ.
        scale: s.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``; None where ``B_0 A_0 = 0``.
    """

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        L, R = change_since(delta, start)
        GL, RO = Gamma @ L, (Omega @ R.T).T
        LGL, RORt = L.T @ GL, RO @ R.T
        w, r = 2 * weight * scale**2, delta.rank
        if start is None:  # L = B and R = A: the products are there already
            RORt_A, BtGL = RORt, LGL
        else:
            RORt_A, BtGL = RORt[:, :r], LGL[:r] + LGL[r:]  # R's first rows are A; B is the sum of L's halves
        return w / 2 * (LGL * RORt).sum(), LowRank(B=w * (GL @ RORt_A), A=w * (BtGL @ RO))

    return form


def change_since(delta: LowRank, start: LowRank | None) -> tuple[Tensor, Tensor]:
    """Returns L and R of (3), which are B and A themselves without a start: no difference of large numbers is taken."""
    if start is None:
        return delta.B, delta.A
    return torch.cat([delta.B - start.B, start.B], dim=1), torch.cat([delta.A, delta.A - start.A])
