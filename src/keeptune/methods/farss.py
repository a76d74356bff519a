"""FARSS: few ranks and quiet directions in shallow blocks, many ranks and loud directions in deep ones.

Chen et al., "FARSS: Fisher-Optimized Adaptive Low-Rank and Singular-Vector Selection for Knowledge-Preserving
Fine-Tuning", 2025.

h are a target's inputs and δ the gradients of the loss in its outputs, both on task data.

    Σ_h = E[h hᵀ],  Σ_δ = E[δ δᵀ],  F ≈ Σ_h ⊗ Σ_δ                          (2)
    I = Tr(Σ_δ W Σ_h Wᵀ) / (m n)                                           (8)
    ω = 1 / (I + ε)                                                        (9)
    R_total = r_avg |E|,  E: the targets of the shallow blocks             (10)
    r_raw = R_total ω / Σ_E ω                                              (11)
    r = clip(round(r_raw), r_min, r_max)                                   (12)
    W = U S Vᵀ                                                             (13)
    λ_i = v_iᵀ Σ_h v_i,  γ_i = u_iᵀ Σ_δ u_i,  s_i = S_i² λ_i γ_i            (14, 15)
    deep:    B = U sqrt(S), A = sqrt(S) Vᵀ  of the R largest s             (16)
    shallow: the same of the r smallest s                                  (17)

ε is not given in the paper; it is 1e-12 of Σ_E I, as in the released code, so that the loss's unit does not matter.
(12) does not keep the budget of (10): most of what clipping takes is lost. ``ranks="exact-budget"`` shares it out
to the unit. The released code decides between (16) and (17) by ``r < 128``, not by depth, and scales by 128 / r
without dividing S by it (``as_released``).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.rank_budget import clipped_shares, exact_shares
from keeptune.linalg.svd import exact_svd
from keeptune.methods.base import allot_rank, check_scaling, dropout_field
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.gradient import DirectionVariances
from keeptune.statistics.request import Labels, Request

__all__ = ["Farss", "direction_scores", "importance", "inverse_weights"]

_log = logging.getLogger(__name__)
_RELEASED_SWITCH = 128
_INPUT = InputCovariance("task")


def importance(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> float:
    """Measure what a small relative change of W costs (eq. 8), without the third product and the trace.

    Law: ``I == Tr(Σ_δ W Σ_h Wᵀ) / (m n)``.

    Args:
        W: ``(m, n)``.
        sigma_h: ``(n, n)``.
        sigma_delta: ``(m, m)``.

    Returns:
        I, at least 0.
    """
    return max(float(((sigma_delta @ W).double() * (W @ sigma_h)).sum()) / W.numel(), 0.0)


def inverse_weights(I: Mapping[Target, float]) -> list[float]:
    """Weigh targets by the inverse of their importance (eq. 9).

    Laws: scaling every I changes nothing; a larger I never weighs more; all I zero weigh alike.

    Args:
        I: Importance per target.

    Returns:
        ω, in the order of the targets.
    """
    total = math.fsum(I.values())
    return [1.0 / (value / total + 1e-12) if total > 0 else 1.0 for value in I.values()]


def direction_scores(S: Tensor, variances: Tensor) -> Tensor:
    """Score singular directions (eq. 15): the loss's curvature along ``S_i u_i v_iᵀ``.

    Law: ``s_i == vec(S_i u_i v_iᵀ)ᵀ (Σ_h ⊗ Σ_δ) vec(S_i u_i v_iᵀ)``.

    Args:
        S: ``(k,)``.
        variances: λ and γ, ``(2, k)``.

    Returns:
        s, ``(k,)``, float64: products of small gradients vanish in float32.
    """
    s: Tensor = S.double().square() * variances.double().clamp_min(0).prod(dim=0)
    return s


@dataclass(frozen=True)
class Farss:
    """FARSS.

    Args:
        rank: R, at the targets of deep blocks.
        r_min: Least rank in shallow blocks.
        r_max: Largest rank in shallow blocks, and never more than a target can have.
        r_avg: Mean rank in shallow blocks that the budget is made of.
        boundary: Blocks below it are shallow; ``"auto"`` searches by short runs (Section 3.1 of the paper names a
            search without an algorithm; :mod:`keeptune.pipeline.boundary_search`).
        variant: ``"farss"``; ``"farss-init"`` only starts differently: rank R and the smallest scores everywhere
            (Table 4); ``"all-high"``: rank R and the largest scores everywhere (Table 6).
        ranks: ``"paper"`` clips (12), ``"exact-budget"`` shares the budget out to the unit.
        labels: Labels of the gradients: ``"true"`` (empirical Fisher, as released) or ``"sampled"`` (Fisher).
        label_seed: Seed of sampled labels; not the training seed, so that runs share their statistics.
        scores: ``"covariance"`` takes Σ_h and Σ_δ; ``"streaming"`` sums λ and γ directly, without the matrices,
            where no importance is needed (deep blocks).
        alpha: None gives every target the scale 1; a number gives alpha / r, and S is divided by it.
        dropout: Dropout before A, during training.
        selection: ``"depth"`` as the paper says; ``"released"``: ranks below 128 take the smallest scores, others
            the largest, and S is not divided by the scale.
        boundary_range: Shares of the depth that ``boundary="auto"`` searches between.
        search_steps: Optimiser steps of one trial.
        search_examples: Examples held out of the task, and knowledge texts, that a trial is scored on.

    Raises:
        PlanError: A value is out of range.
    """

    name: ClassVar[str] = "farss"
    paper: ClassVar[str] = "Chen et al., FARSS, 2025"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None

    rank: int = 8
    r_min: int = 1
    r_max: int = 8
    r_avg: int = 6
    boundary: Literal["auto"] | int = "auto"
    variant: Literal["farss", "farss-init", "all-high"] = "farss"
    ranks: Literal["paper", "exact-budget"] = "paper"
    labels: Labels = "true"
    label_seed: int = 0
    scores: Literal["covariance", "streaming"] = "covariance"
    alpha: float | None = None
    dropout: float = 0.0
    selection: Literal["depth", "released"] = "depth"
    boundary_range: tuple[float, float] = (1 / 8, 1 / 4)
    search_steps: int = 50
    search_examples: int = 64

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: A value is out of range.
        """
        check_scaling(self.alpha, self.dropout)
        first, last = self.boundary_range
        wrong = [
            ("r_min", self.r_min, f"1 to r_max ({self.r_max})", not 1 <= self.r_min <= self.r_max),
            ("r_avg", self.r_avg, "at least 1", self.r_avg < 1),
            ("boundary", self.boundary, "auto, or 0 and more", self.boundary != "auto" and self.boundary < 0),
            ("boundary_range", self.boundary_range, "two shares, 0 < first <= last < 1", not 0 < first <= last < 1),
            ("search_steps", self.search_steps, "at least 1", self.search_steps < 1),
            ("search_examples", self.search_examples, "at least 1", self.search_examples < 1),
        ]
        for name, got, wanted, bad in wrong:
            if bad:
                raise PlanError(f"method.{name}", got=str(got), wanted=wanted, next_step="Correct the value.")

    @classmethod
    def as_released(cls, rank: int = 128, boundary: int = 7, r_max: int = 64, r_avg: int = 50) -> Farss:
        """Do what the authors' repository does, for comparison with the paper's equations.

        Its data differ too: 16 examples rather than 256, padded to 512 tokens that all enter the covariances.

        Args:
            rank: R.
            boundary: Shallow blocks; the repository's ``--layer_split_start k`` makes k + 1 of them.
            r_max: Largest shallow rank.
            r_avg: Mean shallow rank of the budget; the repository lowers it to ``r_max``.

        Returns:
            The method.
        """
        return cls(
            rank=rank,
            boundary=boundary,
            r_max=r_max,
            r_avg=min(r_avg, r_max),
            alpha=float(_RELEASED_SWITCH),
            selection="released",
        )

    @property
    def _gradient(self) -> GradientCovariance:
        return GradientCovariance("task", self.labels, self.label_seed)

    @property
    def _streamed(self) -> DirectionVariances:
        return DirectionVariances("task", self.labels, self.label_seed)

    def requests(self, target: Target) -> frozenset[Request]:
        """Need both covariances on task data, or the variances along singular directions where they are enough."""
        full: set[Request] = {_INPUT, self._gradient}
        if self.scores == "covariance":
            return frozenset(full)
        if self.variant == "farss" and self.boundary == "auto":
            return frozenset(full | {self._streamed})
        return frozenset(full if self._shallow(target) else {self._streamed})

    def candidates(self, blocks: int) -> tuple[Farss, ...]:
        """List the boundaries to try (Section 3.1).

        Args:
            blocks: How many blocks the model has.

        Returns:
            One method per boundary; nothing when the boundary is given.
        """
        if self.boundary != "auto" or self.variant != "farss":
            return ()
        first, last = (share * blocks for share in self.boundary_range)
        tried = range(max(math.ceil(first - 1e-9), 1), max(math.floor(last + 1e-9), 1) + 1)
        # The range is spent: a boundary tried under another range is the same trial.
        spent = type(self).boundary_range
        return tuple(dataclasses.replace(self, boundary=boundary, boundary_range=spent) for boundary in tried)

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> float | None:
        """Measure the importance of a shallow target (eq. 8)."""
        if not self._shallow(target):
            return None
        return importance(weight, stats[_INPUT], stats[self._gradient])

    def allocate(self, scores: Mapping[Target, float | None]) -> Mapping[Target, Decision]:
        """Give deep targets R and shallow ones what their importance leaves them (eqs. 9-12)."""
        I = {target: value for target, value in scores.items() if value is not None}
        decisions = {target: allot_rank(target, self.rank, self.name) for target in scores if target not in I}
        if I:
            decisions |= self._shallow_ranks(I)
        return {target: decisions[target] for target in scores}

    def _shallow_ranks(self, I: Mapping[Target, float]) -> dict[Target, Decision]:
        budget = self.r_avg * len(I)
        high = [min(self.r_max, target.max_rank) for target in I]
        low = [min(self.r_min, most) for most in high]
        if not any(I.values()):
            _log.warning("farss: every gradient is zero; the shallow targets share their ranks evenly")
        omega = inverse_weights(I)
        if self.ranks == "paper":
            found = clipped_shares(omega, budget, low, high)
        elif sum(low) <= budget <= sum(high):
            found = exact_shares(omega, budget, low, high)
        else:
            raise PlanError(
                "method.r_avg",
                got=f"a budget of {budget} ranks for {len(I)} shallow targets",
                wanted=f"{sum(low)} to {sum(high)}, which r_min and r_max allow",
                next_step="Change r_avg, r_min or r_max.",
            )
        if sum(found) != budget:
            _log.info("farss: %d of the shallow budget of %d ranks are allotted", sum(found), budget)
        return {target: Decision(rank) for target, rank in zip(I, found, strict=True)}

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Say what became of the budget.

        Args:
            decisions: From :meth:`allocate`.

        Returns:
            Sentences for the plan.
        """
        shallow = [decision.rank for target, decision in decisions.items() if self._shallow(target)]
        if not shallow:
            return []
        budget = self.r_avg * len(shallow)
        return [
            f"{len(shallow)} targets in blocks below {self.boundary} are shallow: {sum(shallow)} of {budget} ranks "
            f"of their budget allotted, mean {sum(shallow) / len(shallow):.1f} (r_avg {self.r_avg})"
        ]

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Start from the chosen singular directions (eqs. 13-17)."""
        U, S, Vh = exact_svd(weight, target.name)
        evidence = {"spectrum": S}
        if self._streamed in self.requests(target):
            variances = stats[self._streamed]
        else:
            sigma_h, sigma_delta = stats[_INPUT], stats[self._gradient]
            variances = torch.stack([((Vh @ sigma_h) * Vh).sum(1), ((sigma_delta @ U) * U).sum(0)])
            if self._shallow(target):
                evidence["importance"] = torch.tensor([importance(weight, sigma_h, sigma_delta)])
        s = direction_scores(S, variances)
        r = decision.rank
        order = torch.argsort(s, descending=True, stable=True)
        chosen = order[-r:] if self._takes_low(target, r) else order[:r]
        scale = 1.0 if self.alpha is None else self.alpha / r
        sizes = S[chosen] / (1.0 if self.selection == "released" else scale)
        return TargetPlan(
            target=target,
            decision=decision,
            init=LowRank.from_triplets(U[:, chosen], sizes, Vh[chosen]),
            scale=scale,
            trainable=frozenset({"A", "B"}),
            evidence=evidence | {"singular_values": S[chosen], "direction_score": s[chosen].float()},
        )

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)

    def _shallow(self, target: Target) -> bool:
        if self.variant != "farss":
            return False
        if self.boundary == "auto":
            raise PlanError(
                "method.boundary",
                got="auto",
                wanted="a number of blocks for a plan made directly",
                next_step="Give one, or run a recipe: it searches with short runs before it plans.",
            )
        return 0 <= target.layer < self.boundary

    def _takes_low(self, target: Target, r: int) -> bool:
        if self.selection == "released":
            return r < _RELEASED_SWITCH
        return self.variant == "farss-init" or self._shallow(target)
