"""MiCA: write only into the output directions that W uses least.

"Minor Component Adaptation", arXiv 2604.01694, as PEFT has it.

    W = U S Vᵀ
    B = the left singular vectors of the r smallest singular values, frozen   (1)
    A = 0, trained                                                            (2)
    y = W x + s B A x                                                         (3)

Every change lies in span(B), whatever A learns. Not MiLoRA, which starts from the minor part of W and trains both
factors. Nothing is taken out of W: the start is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.triplets import end_triplets
from keeptune.methods.base import allot_rank, check_scaling, dropout_field
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Mica"]


@dataclass(frozen=True)
class Mica:
    """MiCA.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is r, a scale of 1.
        dropout: Dropout before A, during training.
    """

    name: ClassVar[str] = "mica"
    paper: ClassVar[str] = "MiCA, 2026"
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
        """Take W's minor output directions (1, 2)."""
        U, S, _ = end_triplets(weight, decision.rank, "bottom", target.name)
        return TargetPlan(
            target=target,
            decision=decision,
            init=LowRank(B=U.float(), A=torch.zeros(decision.rank, target.in_features)),
            scale=1.0 if self.alpha is None else self.alpha / decision.rank,
            trainable=frozenset({"A"}),
            evidence={"singular_values": S.float()},
        )

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)
