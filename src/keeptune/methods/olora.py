"""OLoRA: start from the first columns of W's QR decomposition.

Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024.

    W = Q R                                                              (1)
    B = Q_r,  A = R_r                             first r columns, rows  (2)
    W_res = W - s B A                             frozen                 (3)
    y = (W_res + s B A) x

Q_r spans W's first r columns, and R_r = Q_rᵀ W, so only r columns are decomposed. The split is not balanced:
B's columns have length 1, A holds all of W's size. As in PEFT, a scale s other than 1 leaves the factors as they are:
(3) keeps the output unchanged, but s B A is then not the part of W that Q_r spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import canonical_signs
from keeptune.methods.base import ScaledMethod
from keeptune.statistics.collect import StatsView


def leading_qr(W: Tensor, r: int) -> LowRank:
    """Returns r columns of Q and rows of R (1, 2), by way of float64; the largest entry of a column is positive.

    Laws: ``BᵀB == I``; ``B A == B Bᵀ W``; the first r columns of ``B A`` are those of W; r = min(m, n) gives W.
    """
    W = W.double()
    Q = canonical_signs(torch.linalg.qr(W[:, :r])[0])
    return LowRank(B=Q.float(), A=(Q.T @ W).float())


@dataclass(frozen=True)
class Olora(ScaledMethod):
    """OLoRA."""

    name = "olora"
    paper = "Büyükakyüz, OLoRA, 2024"
    anchored = True

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Decomposes W's first columns (1, 2)."""
        return self.planned(target, decision, leading_qr(weight, decision.rank), self.scale_at(decision.rank))
