"""DoRA: train the direction of each row of W by a low-rank change, and its length by a number of its own.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.

    W' = m ∘ V / ‖V‖,   V = W + s B A                                     (5, 6)
    m = ‖W‖ at the start, with B = 0: W' = W
    ‖V‖ is held constant in the backward pass                             (section 4.3)

‖·‖ are the Euclidean lengths of the rows of W (out x in), one per output. The paper writes W the other way
round and says columns. The forward pass is PEFT's, which forms V (m x n) in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import allot_rank, check_scaling, dropout_field
from keeptune.methods.lora import draw_start, scale_of
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Dora"]


@dataclass(frozen=True)
class Dora:
    """DoRA.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is 2 r, the usual choice.
        dropout: Dropout before A and before W's share of eq. 5, during training.
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
        seed: Seed of A; the recipe gives the training seed unless told otherwise.
    """

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "Liu et al., DoRA, ICML 2024"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
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
        """Draw A, set B to zero, measure the rows of W (eq. 5)."""
        m = torch.linalg.vector_norm(weight, dim=1)
        zeros = int((m == 0).sum())
        if zeros:
            # (5) would divide zero by zero, and PEFT's forward pass would give NaN.
            raise PlanError(
                f"method {self.name}, target {target.name}",
                got=f"{zeros} rows of zeros in its weight, which have no direction",
                wanted="none",
                next_step=f"Leave the role {target.role} out of `targets`, or use `lora`.",
            )
        return TargetPlan(
            target=target,
            decision=decision,
            init=draw_start(target, decision.rank, self.seed),
            scale=scale_of(decision.rank, self.alpha, self.use_rslora),
            trainable=frozenset({"A", "B", "magnitude"}),
            vectors={"magnitude": m},
        )

    def peft(self) -> Mapping[str, Any]:
        """Ask PEFT for DoRA."""
        return {"use_dora": True, **dropout_field(self.dropout)}
