"""KaSA: drop W's smallest singular components for good, and learn a change in the form of an SVD.

Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", ICLR 2025.

    W_world = W - U_r S_r V_rᵀ           without the r smallest singular components      (stage 1)
    y = W_world x + s B diag(d) A x      d ~ N(0, 1), A random, B = 0 at the start       (stage 2)
    L = L_task + beta L_2 + gamma L_3
    L_2 = sum d²                                                                         (9, 10)
    L_3 = ‖BᵀB - I‖ + ‖AAᵀ - I‖          as if B and Aᵀ held singular vectors             (11)

L_2 and L_3 are means over the targets. ``regularizer="gram"`` takes (11), the r x r form; ``"released"`` takes
the released code's ‖B Bᵀ - I_m‖ + ‖Aᵀ A - I_n‖, the n x n form, of which no rank-r A can reach zero: by
‖AᵀA - I_n‖² = ‖AAᵀ - I_r‖² + n - r it is the same term, damped. PEFT's ``_get_kasa_loss`` is (11), summed over
the targets. The released code drops nothing where m < n; here, as in PEFT, r of min(m, n) components go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.triplets import end_triplets
from keeptune.methods.base import allot_rank, check_scaling, dropout_field, generator_for
from keeptune.methods.lora import draw_A, scale_of
from keeptune.methods.strength import Strength
from keeptune.penalties.kasa_regularizers import KasaRegularizers, Regularizer
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Kasa", "dropped_part"]


def dropped_part(W: Tensor, r: int, where: str) -> tuple[LowRank, Tensor]:
    """Find W's r smallest singular components (stage 1).

    Laws: ``W - B A`` is the nearest matrix of rank min(m, n) - r; ``A Aᵀ == I``; ``Bᵀ B == diag(S²)``.

    Args:
        W: ``(m, n)``.
        r: How many, below min(m, n).
        where: The module's name, for messages.

    Returns:
        ``B = U_r diag(S_r)`` and ``A = V_rᵀ``, float32, and S_r, descending.
    """
    U, S, Vh = end_triplets(W, r, "bottom", where)
    return LowRank(B=(U * S).float(), A=Vh.float()), S.float()


@dataclass(frozen=True)
class Kasa:
    """KaSA.

    Args:
        rank: r, at every target: as many components are dropped as are learned.
        alpha: Scale numerator; None is 2 r, the usual choice.
        beta: Weight of the singular values' squares. FARSS: 1e-2 on Llama-2, 1e-4 on Llama-3.
        gamma: Weight of orthogonality. FARSS: 1e-4 on Llama-2, 1e-3 on Llama-3.
        regularizer: ``"gram"`` as in the paper and PEFT, ``"released"`` as in the released code.
        dropout: Dropout before A, during training.
        seed: Seed of A and d; the recipe gives the training seed unless told otherwise.

    Raises:
        PlanError: beta or gamma is below 0, alpha or dropout is out of range.
    """

    name: ClassVar[str] = "kasa"
    paper: ClassVar[str] = "Wang et al., KaSA, ICLR 2025"
    scope: ClassVar[Scope] = "adapter"
    moves_start: ClassVar[bool] = True
    strength_option: ClassVar[Strength | None] = None

    rank: int = 8
    alpha: float | None = None
    beta: float = 1e-4
    gamma: float = 1e-3
    regularizer: Regularizer = "gram"
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: beta or gamma is below 0, alpha or dropout is out of range.
        """
        check_scaling(self.alpha, self.dropout)
        for name, value in (("beta", self.beta), ("gamma", self.gamma)):
            if not 0 <= value < float("inf"):
                raise PlanError(f"method.{name}", got=str(value), wanted="0 or more", next_step="Correct the value.")

    def requests(self, target: Target) -> frozenset[Request]:
        """Need nothing."""
        return frozenset()

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> None:
        """Treat all targets alike."""

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Give every target the same rank; something of W must be left."""
        for target in scores:
            if self.rank == target.max_rank:
                raise PlanError(
                    f"method {self.name}, target {target.name}",
                    got=f"rank {self.rank}, which drops all of W",
                    wanted=f"1 to {target.max_rank - 1} for a {target.out_features} x {target.in_features} map",
                    next_step=f"Lower `method.rank`, or leave the role {target.role} out of `targets`.",
                )
        return {target: allot_rank(target, self.rank, self.name) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Find what W loses; draw A and d, set B to zero."""
        r, generator = decision.rank, generator_for(target, self.seed)
        scale = scale_of(r, self.alpha)
        dropped, S = dropped_part(weight, r, target.name)
        return TargetPlan(
            target=target,
            decision=decision,
            init=LowRank(B=torch.zeros(target.out_features, r), A=draw_A(r, target.in_features, generator)),
            scale=scale,
            trainable=frozenset({"A", "B", "diag"}),
            removed=dropped.scaled(1 / scale),
            vectors={"diag": torch.randn(r, generator=generator)},
            evidence={"dropped_values": S, "dropped_energy": (S**2).sum()[None] / weight.square().sum()},
        )

    def peft(self) -> Mapping[str, Any]:
        """Let the adapter's config say KaSA."""
        return {"kasa_config": {"beta": self.beta, "gamma": self.gamma}, **dropout_field(self.dropout)}

    def penalties(self) -> tuple[KasaRegularizers]:
        """Ask for both regularisers."""
        return (KasaRegularizers(self.beta, self.gamma, self.regularizer),)
