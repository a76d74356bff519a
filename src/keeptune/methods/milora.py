"""MiLoRA: train the minor part of W, freeze the principal part that holds what was learned.

Wang, Li, Wang, Chen and Chen, "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
NAACL 2025.

    W = U S Vᵀ = W_p + W_m                        W_m: the r smallest triplets
    B = U_m sqrt(S_m),  A = sqrt(S_m) V_mᵀ                               (1)
    y = (W_p + B A) x                             W_p frozen             (2)

With a scale s = alpha / r other than 1, S_m / s takes the place of S_m, as in the released code. The minor triplets
are found in float64: rounding in float32 is of their size where the spectrum falls by many decades.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.triplets import end_triplets
from keeptune.methods.base import allot_rank, check_scaling, dropout_field, warn_of_zeros
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Milora"]


@dataclass(frozen=True)
class Milora:
    """MiLoRA.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is r, a scale of 1 as in the released code.
        dropout: Dropout before A, during training; 0.05 in the paper.
    """

    name: ClassVar[str] = "milora"
    paper: ClassVar[str] = "Wang et al., MiLoRA, NAACL 2025"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: alpha or dropout is out of range.
        """
        check_scaling(self.alpha, self.dropout)

    def requests(self, target: Target) -> frozenset[Request]:
        """Need nothing."""
        return frozenset()

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> None:
        """Treat all targets alike."""

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Give every target the same rank."""
        return {target: allot_rank(target, self.rank, self.name) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Split W's minor part into balanced factors (1)."""
        U, S, Vh = end_triplets(weight, decision.rank, "bottom", target.name)
        warn_of_zeros(target, S, weight)
        scale = 1.0 if self.alpha is None else self.alpha / decision.rank
        return TargetPlan(
            target=target,
            decision=decision,
            init=LowRank.from_triplets(U, S / scale, Vh),
            scale=scale,
            trainable=frozenset({"A", "B"}),
            evidence={"singular_values": S.float()},
        )

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)
