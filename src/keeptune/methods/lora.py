"""Plain LoRA, the baseline.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

    y = W x + (alpha / r) B A x                                          (1)
    A ~ U(-1/sqrt(n), 1/sqrt(n)),  B = 0                                 (2)

(2) is what PEFT does (Kaiming-uniform with a = sqrt 5); the paper draws A from a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import allot_rank, check_scaling, dropout_field, generator_for
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Lora", "draw_A", "draw_start", "lora_start", "scale_of"]


def draw_A(r: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw the down-projection (eq. 2).

    Args:
        r: Rank.
        n: Input features.
        generator: Where the randomness comes from.

    Returns:
        ``(r, n)``, uniform in ±1/sqrt(n).
    """
    return (torch.rand(r, n, generator=generator) * 2 - 1) / math.sqrt(n)


def draw_start(target: Target, r: int, seed: int) -> LowRank:
    """Draw A and set B to zero (eq. 2), with one stream per target.

    Law: a target's factors do not depend on which others are tuned.

    Args:
        target: The target.
        r: Rank.
        seed: The seed of all targets.

    Returns:
        The factors at the first step.
    """
    return LowRank(B=torch.zeros(target.out_features, r), A=draw_A(r, target.in_features, generator_for(target, seed)))


def scale_of(r: int, alpha: float | None, use_rslora: bool = False) -> float:
    """Give the scale of eq. 1.

    Args:
        r: Rank.
        alpha: Its numerator; None is 2 r.
        use_rslora: Divide by sqrt(r) instead of r.

    Returns:
        s.
    """
    return (2.0 * r if alpha is None else alpha) / (math.sqrt(r) if use_rslora else r)


def lora_start(target: Target, decision: Decision, seed: int, scale: float) -> TargetPlan:
    """Plan a target as plain LoRA: A drawn, B zero (eq. 2), both trained.

    Args:
        target: The target.
        decision: Its rank.
        seed: The method's seed.
        scale: s.

    Returns:
        The target's plan.
    """
    return TargetPlan(
        target=target,
        decision=decision,
        init=draw_start(target, decision.rank, seed),
        scale=scale,
        trainable=frozenset({"A", "B"}),
    )


@dataclass(frozen=True)
class Lora:
    """Plain LoRA.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is 2 r, the usual choice.
        dropout: Dropout before A, during training.
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
        seed: Seed of A; the recipe gives the training seed unless told otherwise.

    Raises:
        PlanError: alpha is not above 0, or dropout is not in [0, 1).
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al., LoRA, ICLR 2022"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: alpha is not above 0, or dropout is not in [0, 1).
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
        """Draw A, set B to zero (eq. 2)."""
        return lora_start(target, decision, self.seed, scale_of(decision.rank, self.alpha, self.use_rslora))

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)
