"""Importance of weights and of singular directions, and the ranks it leaves: (8) to (12) and (15) of farss.py."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision
from keeptune.core.target import Target
from keeptune.linalg.rank_budget import clipped_shares, exact_shares

_log = logging.getLogger(__name__)


def importance(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> float:
    """Computes what a small relative change of W ``(m, n)`` costs (eq. 8), without the third product and the trace.

    Law: ``I == Tr(Σ_δ W Σ_h Wᵀ) / (m n)``.
    """
    return max(float(((sigma_delta @ W).double() * (W @ sigma_h)).sum()) / W.numel(), 0.0)


def inverse_weights(I: Mapping[Target, float]) -> list[float]:
    """Weighs targets by the inverse of their importance (eq. 9); returns ω in their order.

    Laws: scaling every I changes nothing; a larger I never weighs more; all I zero weigh alike.
    """
    total = math.fsum(I.values())
    return [1.0 / (value / total + 1e-12) if total > 0 else 1.0 for value in I.values()]


def direction_scores(S: Tensor, variances: Tensor) -> Tensor:
    """Scores singular directions (eq. 15), by the loss's curvature along ``S_i u_i v_iᵀ``.

    Law: ``s_i == vec(S_i u_i v_iᵀ)ᵀ (Σ_h ⊗ Σ_δ) vec(S_i u_i v_iᵀ)``.

    Args:
        S: ``(k,)``.
        variances: λ and γ, ``(2, k)``.

    Returns:
        s, ``(k,)``, float64: products of small gradients vanish in float32.
    """
    s: Tensor = S.double().square() * variances.double().clamp_min(0).prod(dim=0)
    return s


def shallow_ranks(
    I: Mapping[Target, float], r_avg: int, r_min: int, r_max: int, *, exact: bool
) -> dict[Target, Decision]:
    """Shares ranks out by the inverse of the importance (eqs. 9-12).

    Args:
        I: Importance per target.
        r_avg: The mean rank that the budget is made of.
        r_min: The least rank.
        r_max: The largest rank, and never more than a target can have.
        exact: Whether what clipping takes is shared out again.

    Raises:
        PlanError: The limits do not allow the exact budget.
    """
    budget = r_avg * len(I)
    high = [min(r_max, target.max_rank) for target in I]
    low = [min(r_min, most) for most in high]
    if not any(I.values()):
        _log.warning("farss: every gradient is zero; the shallow targets share their ranks evenly")
    omega = inverse_weights(I)
    if not exact:
        ranks = clipped_shares(omega, budget, low, high)
    elif sum(low) <= budget <= sum(high):
        ranks = exact_shares(omega, budget, low, high)
    else:
        raise PlanError(
            "method.r_avg",
            got=f"a budget of {budget} ranks for {len(I)} shallow targets",
            wanted=f"{sum(low)} to {sum(high)}, which r_min and r_max allow",
            next_step="Change r_avg, r_min or r_max.",
        )
    if sum(ranks) != budget:
        _log.info("farss: %d of the shallow budget of %d ranks are allotted", sum(ranks), budget)
    return {target: Decision(rank) for target, rank in zip(I, ranks, strict=True)}
