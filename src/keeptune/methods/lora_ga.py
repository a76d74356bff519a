"""LoRA-GA: let the first step of LoRA move W as a step of full fine-tuning would.

Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024.

    G = dL/dW = U S Vᵀ                            on task data, summed over all of it  (1)
    A = c V_[1:r]ᵀ,  B = c U_[r+1:2r],  c = m^¼ / sqrt(γ)                              (2)
    W_res = W - s B A                             frozen                              (3)

At the start, a step on B moves W along A's rows and one on A along B's columns: together the best approximation of G
of rank 2r. The split of the 2r directions is ``direction``; (2) is the paper's, ``ArB2r``. Other scales: ``unit``
takes c = 1, ``gd_scale`` c = 1/s, ``weight_svd`` the mean root of W's r largest singular values over s.

PEFT departs from the paper and the authors' code: it multiplies B by the gradient's singular values, so that the
start depends on the size of the loss, and ``stable`` leaves A at c = 1. ``factors="peft"`` does that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import end_triplets
from keeptune.methods.base import ScaledMethod, allot_rank, generator_for
from keeptune.statistics.collect import StatsView
from keeptune.statistics.gradient import WeightGradient
from keeptune.statistics.request import Request

_log = logging.getLogger(__name__)
_GRADIENT = WeightGradient("task", labels="true")


@dataclass(frozen=True)
class LoraGA(ScaledMethod):
    """LoRA-GA.

    Args:
        rank: r, at every target; 2 r directions of the gradient are used.
        alpha: Scale numerator; None is 2 r, the paper's.
        direction: Which of the 2 r directions A and B take: ``"ArB2r"`` (A the first r), ``"A2rBr"`` (B the first r),
            ``"ArBr"`` (in turns, B first), or ``"random"``.
        scale: ``"stable"``, ``"unit"``, ``"gd_scale"`` or ``"weight_svd"``.
        stable_gamma: γ of ``"stable"``; 16 in the paper.
        factors: ``"paper"``, or ``"peft"``: as PEFT scales them.
        seed: Seed of ``"random"``; the recipe sets the training seed unless its method section has one.
    """

    name = "lora-ga"
    paper = "Wang et al., LoRA-GA, NeurIPS 2024"
    anchored = True
    default_scale = 2.0
    ranges = {"stable_gamma": Range(above=0)}

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "unit", "gd_scale", "weight_svd"] = "stable"
    stable_gamma: float = 16
    factors: Literal["paper", "peft"] = "paper"
    seed: int = 0

    @property
    def statistics(self) -> frozenset[Request]:
        """The weight's gradient on the task."""
        return frozenset({_GRADIENT})

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> float:
        """Returns the size of the gradient: a target may have none."""
        return float(stats[_GRADIENT].norm())

    def allocate(self, scores: Mapping[Target, float]) -> Mapping[Target, Decision]:
        """Decides on the same rank for all targets that have a gradient."""
        tightest = min(scores, key=lambda target: target.max_rank)
        allot_rank(tightest, 2 * self.rank, f"{self.name} (2 x rank)")
        for target, size in scores.items():
            if size == 0:
                _log.warning("%s: the gradient is zero; the target is left alone", target.name)
        return {t: Decision(self.rank if size > 0 else 0) for t, size in scores.items()}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Splits the gradient's leading directions between A and B (1, 2)."""
        r = decision.rank
        s = self.scale_at(r)
        U, S, Vh = end_triplets(stats[_GRADIENT].to(weight.device), 2 * r, "top", target.name)
        for_A, for_B = self._split(target, r)
        c_A, c_B = self._scales(target, weight, S[for_B], s)
        start = LowRank(B=(U[:, for_B] * c_B).float(), A=(c_A * Vh[for_A]).float())
        return self.planned(target, decision, start, s, evidence={"gradient_singular_values": S.float()})

    def _split(self, target: Target, r: int) -> tuple[Tensor, Tensor]:
        first, second = torch.arange(r), torch.arange(r, 2 * r)
        drawn = torch.randperm(2 * r, generator=generator_for(target, self.seed))
        return {
            "ArB2r": (first, second),
            "A2rBr": (second, first),
            "ArBr": (2 * first + 1, 2 * first),
            "random": (drawn[:r], drawn[r:]),
        }[self.direction]

    def _scales(self, target: Target, weight: Tensor, S_B: Tensor, s: float) -> tuple[float, Tensor | float]:
        """Returns c of A and of B (2): numbers, or a number per column of B."""
        stable = weight.shape[0] ** 0.25 / self.stable_gamma**0.5
        S_W = end_triplets(weight, len(S_B), "top", target.name)[1] if self.scale == "weight_svd" else S_B
        if self.factors == "paper":
            c = {"stable": stable, "unit": 1.0, "gd_scale": 1 / s, "weight_svd": float((S_W / s).sqrt().mean())}
            return c[self.scale], c[self.scale]
        c_B = {"stable": stable, "unit": 1.0, "gd_scale": 1 / s, "weight_svd": float(S_W[0] / S_B[0].clamp_min(1e-30))}[
            self.scale
        ]
        return (1 / s if self.scale == "gd_scale" else 1.0), S_B * c_B
