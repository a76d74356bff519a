"""Plain LoRA, the baseline.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

    y = W x + (alpha / r) B A x                                          (1)
    A ~ U(-1/sqrt(n), 1/sqrt(n)),  B = 0                                 (2)

(2) is what PEFT does (Kaiming-uniform with a = sqrt 5); the paper draws A from a Gaussian.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import ScaledMethod, generator_for
from keeptune.statistics.collect import StatsView


def draw_start(target: Target, r: int, seed: int) -> LowRank:
    """Draws A and sets B to zero (eq. 2), with one stream per target.

    Law: a target's factors do not depend on which others are tuned.
    """
    A = torch.rand(r, target.in_features, generator=generator_for(target, seed)) * 2 - 1
    return LowRank(B=torch.zeros(target.out_features, r), A=A / math.sqrt(target.in_features))


@dataclass(frozen=True)
class LoraStart(ScaledMethod):
    """A method that starts as LoRA does: A drawn, B zero.

    Args:
        alpha: Scale numerator; None is 2 r, the usual choice.
        seed: Seed of A; the recipe sets the training seed unless its method section has one.
    """

    default_scale = 2.0

    seed: int = 0

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Draws A and sets B to zero (eq. 2)."""
        r = decision.rank
        return self.planned(target, decision, draw_start(target, r, self.seed), self.scale_at(r))


@dataclass(frozen=True)
class Lora(LoraStart):
    """Plain LoRA.

    Args:
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
    """

    name = "lora"
    paper = "Hu et al., LoRA, ICLR 2022"

    use_rslora: bool = False

    def scale_at(self, r: int) -> float:
        """Returns alpha / r, or alpha / sqrt(r)."""
        if not self.use_rslora:
            return super().scale_at(r)
        return (2.0 * r if self.alpha is None else self.alpha) / math.sqrt(r)
