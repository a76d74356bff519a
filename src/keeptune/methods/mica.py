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

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import end_triplets
from keeptune.methods.base import ScaledMethod
from keeptune.statistics.collect import StatsView


@dataclass(frozen=True)
class Mica(ScaledMethod):
    """MiCA."""

    name = "mica"
    paper = "MiCA, 2026"
    trains = frozenset({"A"})

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Takes W's minor output directions (1, 2)."""
        r = decision.rank
        U, S, _ = end_triplets(weight, r, "bottom", target.name)
        start = LowRank(B=U.float(), A=torch.zeros(r, target.in_features))
        return self.planned(target, decision, start, self.scale_at(r), evidence={"singular_values": S.float()})
