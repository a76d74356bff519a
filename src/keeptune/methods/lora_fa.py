"""LoRA-FA: freeze the down-projection, train the up-projection only.

Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023.

    y = W x + (alpha / r) B A x,   A random and frozen, B = 0 at the start           (1)
    g_B <- (r / alpha)^2 g_B (A Aᵀ)⁻¹                                                (2)

With (1) alone and AdamW, as the papers that compare with it do, the change stays in the row space that A
spans from the start. (2) is what PEFT's ``create_lorafa_optimizer`` does before its Adam: the step of B whose
``s B A`` comes nearest to the step that full fine-tuning would take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import allot_rank, check_scaling, dropout_field
from keeptune.methods.lora import draw_start, scale_of
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["LoraFA"]


@dataclass(frozen=True)
class LoraFA:
    """LoRA with a frozen A.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is 2 r, the usual choice.
        dropout: Dropout before A, during training.
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
        optimizer: ``"adamw"``, or ``"preconditioned"`` for PEFT's, with eq. 2.
        seed: Seed of A; the recipe gives the training seed unless told otherwise.
    """

    name: ClassVar[str] = "lora-fa"
    paper: ClassVar[str] = "Zhang et al., LoRA-FA, 2023"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    optimizer: Literal["adamw", "preconditioned"] = "adamw"
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
        """Draw A and freeze it, set B to zero (eq. 1)."""
        return TargetPlan(
            target=target,
            decision=decision,
            init=draw_start(target, decision.rank, self.seed),
            scale=scale_of(decision.rank, self.alpha, self.use_rslora),
            trainable=frozenset({"B"}),
        )

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)

    def training(self) -> Mapping[str, Any]:
        """Ask for PEFT's optimiser where it is wanted (eq. 2)."""
        return {"optimizer": "lora-fa"} if self.optimizer == "preconditioned" else {}
