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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.eigen import canonical_signs
from keeptune.methods.base import allot_rank, check_scaling, dropout_field
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Olora", "leading_qr"]


def leading_qr(W: Tensor, r: int) -> LowRank:
    """Take the first r columns of Q and rows of R (1, 2), computed in float64.

    Laws: ``BᵀB == I``; ``B A == B Bᵀ W``; the first r columns of ``B A`` are those of W; r = min(m, n) gives W.

    Args:
        W: ``(m, n)``.
        r: 1 <= r <= min(m, n).

    Returns:
        The factors, float32, the largest entry of each column of B positive.
    """
    W = W.double()
    Q = canonical_signs(torch.linalg.qr(W[:, :r])[0])
    return LowRank(B=Q.float(), A=(Q.T @ W).float())


@dataclass(frozen=True)
class Olora:
    """OLoRA.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is r, a scale of 1.
        dropout: Dropout before A, during training.
    """

    name: ClassVar[str] = "olora"
    paper: ClassVar[str] = "Büyükakyüz, OLoRA, 2024"
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
        """Decompose W's first columns (1, 2)."""
        return TargetPlan(
            target=target,
            decision=decision,
            init=leading_qr(weight, decision.rank),
            scale=1.0 if self.alpha is None else self.alpha / decision.rank,
            trainable=frozenset({"A", "B"}),
        )

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)
