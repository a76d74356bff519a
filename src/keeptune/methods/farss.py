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
(12) does not keep the budget of (10): most of what clipping takes is lost. The released code decides between (16) and
(17) by ``r < 128``, not by depth, and scales by 128 / r without dividing S by it (``selection="released"``).
"""

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import exact_svd
from keeptune.methods.base import ScaledMethod, Size, allot_rank
from keeptune.statistics.collect import StatsView
from keeptune.statistics.covariance import DirectionVariances, GradientCovariance, InputCovariance
from keeptune.statistics.request import Labels, Request

_log = logging.getLogger(__name__)
_INPUT = InputCovariance("task")


def importance(W: Tensor, sigma_h: Tensor, sigma_delta: Tensor) -> float:
    """Computes what a small relative change of W ``(m, n)`` costs (eq. 8), without the third product and the trace.

    Law: ``I == Tr(Σ_δ W Σ_h Wᵀ) / (m n)``.
    """
    return max(float(((sigma_delta @ W).double() * (W @ sigma_h)).sum()) / W.numel(), 0.0)


def inverse_weights(I: Mapping[Target, float]) -> list[float]:
    """Weighs targets by the inverse of their importance (eq. 9); returns ω in their order.

    Laws: scaling every I changes nothing; a larger I never weighs more; all I zero weigh alike.
    """
    total = math.fsum(I.values())
    return [1.0 / (value / total + 1e-12) if total > 0 else 1.0 for value in I.values()]


def direction_scores(S: Tensor, variances: Tensor) -> Tensor:
    """Scores singular directions (eq. 15), by the loss's curvature along ``S_i u_i v_iᵀ``.

    Law: ``s_i == vec(S_i u_i v_iᵀ)ᵀ (Σ_h ⊗ Σ_δ) vec(S_i u_i v_iᵀ)``.

    Args:
        S: ``(k,)``.
        variances: λ and γ, ``(2, k)``.

    Returns:
        s, ``(k,)``, float64: products of small gradients vanish in float32.
    """
    s: Tensor = S.double().square() * variances.double().clamp_min(0).prod(dim=0)
    return s


def shallow_ranks(I: Mapping[Target, float], r_avg: int, r_min: int, r_max: int) -> dict[Target, Decision]:
    """Shares ranks out by the inverse of the importance (eqs. 9-12), never more than a target can have."""
    if not any(I.values()):
        _log.warning("farss: every gradient is zero; the shallow targets share their ranks evenly")
    omega = inverse_weights(I)
    scale = r_avg * len(I) / math.fsum(omega)
    most = [min(r_max, target.max_rank) for target in I]
    ranks = (min(max(round(scale * w), min(r_min, high)), high) for w, high in zip(omega, most, strict=True))
    return {target: Decision(rank) for target, rank in zip(I, ranks, strict=True)}


@dataclass(frozen=True)
class Farss(ScaledMethod):
    """FARSS.

    Args:
        rank: R, at the targets of deep blocks.
        r_min: Least rank in shallow blocks.
        r_max: Largest rank in shallow blocks, and never more than R or than a target can have.
        r_avg: Mean rank in shallow blocks that the budget is made of, R at most.
        boundary: Blocks below it are shallow; ``"auto"`` is a quarter of the depth, the upper end of the range that
            Section 3.1 of the paper searches (it gives no algorithm; a sweep over the boundary is one).
        variant: ``"farss"``; ``"farss-init"`` only starts differently: rank R and the smallest scores everywhere
            (Table 4); ``"all-high"``: rank R and the largest scores everywhere (Table 6).
        labels: Labels of the gradients: ``"true"`` (empirical Fisher, as released); ``"sampled"`` or ``"probe"``.
        label_seed: Seed of the draws; not the training seed, so that runs share their statistics.
        scores: ``"covariance"`` takes Σ_h and Σ_δ; ``"streaming"`` sums λ and γ directly, without the matrices,
            where no importance is needed (deep blocks).
        selection: ``"depth"`` as the paper says; ``"released"``: ranks below 128 take the smallest scores, others
            the largest, and S is not divided by the scale.
    """

    name = "farss"
    paper = "Chen et al., FARSS, 2025"
    anchored = True
    ranges = {**dict.fromkeys(("r_min", "r_avg"), Range(least=1)), "boundary": Range(least=0)}

    r_min: int = 1
    r_max: int = 8
    r_avg: int = 6
    boundary: Literal["auto"] | int = "auto"
    variant: Literal["farss", "farss-init", "all-high"] = "farss"
    labels: Labels = "true"
    label_seed: int = 0
    scores: Literal["covariance", "streaming"] = "covariance"
    selection: Literal["depth", "released"] = "depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.r_min <= self.r_max, "r_min", f"1 to r_max ({self.r_max})")

    @classmethod
    def as_released(cls, rank: int = 128, boundary: int = 7, r_max: int = 64, r_avg: int = 50) -> Self:
        """Returns what the authors' repository does; its data are 16 examples whose padding enters the covariances.

        Its ``--layer_split_start k`` is a boundary of k + 1. It lowers ``r_max`` to the rank, and ``r_avg`` to that.
        """
        most, average = min(r_max, rank), min(r_avg, r_max, rank)
        return cls(rank=rank, boundary=boundary, r_max=most, r_avg=average, alpha=128.0, selection="released")

    def fitted(self, blocks: int) -> Self:
        """Returns the method with its boundary decided."""
        if self.boundary != "auto" or self.variant != "farss":
            return self
        return dataclasses.replace(self, boundary=max(blocks // 4, 1))

    @property
    def _gradient(self) -> GradientCovariance:
        return GradientCovariance("task", self.labels, seed=self.label_seed)

    @property
    def _streamed(self) -> DirectionVariances:
        return DirectionVariances("task", self.labels, seed=self.label_seed)

    @property
    def statistics(self) -> frozenset[Request]:
        """Both covariances on task data, and the variances along singular directions where they may be enough."""
        full: set[Request] = {_INPUT, self._gradient}
        return frozenset(full if self.scores == "covariance" else full | {self._streamed})

    def requests(self, target: Target) -> frozenset[Request]:
        """Returns the covariances of shallow targets and the variances of the others."""
        if self.scores == "covariance":
            return self.statistics
        return frozenset({_INPUT, self._gradient} if self._shallow(target) else {self._streamed})

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> float | None:
        """Returns the importance of a shallow target (eq. 8)."""
        return importance(weight, stats[_INPUT], stats[self._gradient]) if self._shallow(target) else None

    def allocate(self, scores: Mapping[Target, float | None]) -> Mapping[Target, Decision]:
        """Allots R to deep targets, and to shallow ones what their importance leaves them (eqs. 9-12)."""
        I = {target: value for target, value in scores.items() if value is not None}
        decisions = {target: allot_rank(target, self.rank, self.name) for target in scores if target not in I}
        if I:
            decisions |= shallow_ranks(I, *self._shares)
        return {target: decisions[target] for target in scores}

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Returns what became of the budget."""
        shallow = [decision.rank for target, decision in decisions.items() if self._shallow(target)]
        count, total = len(shallow), sum(shallow)
        if not count:
            return []
        average = self._shares[0]
        ranks = f"{total} of {average * count} ranks of their budget allotted, mean {total / count:.1f}"
        return [f"{count} targets in blocks below {self.boundary} are shallow: {ranks} (r_avg {average})"]

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Starts from the chosen singular directions (eqs. 13-17)."""
        U, S, Vh = exact_svd(weight, target.name)
        evidence = {"spectrum": S}
        if self._streamed in self.requests(target):
            variances = stats[self._streamed]
        else:
            sigma_h, sigma_delta = stats[_INPUT], stats[self._gradient]
            variances = torch.stack([((Vh @ sigma_h) * Vh).sum(1), ((sigma_delta @ U) * U).sum(0)])
            if self._shallow(target):
                evidence["importance"] = torch.tensor([importance(weight, sigma_h, sigma_delta)])
        r, s = decision.rank, direction_scores(S, variances)
        order = torch.argsort(s, descending=True, stable=True)
        low = r < 128 if self.selection == "released" else self.variant == "farss-init" or self._shallow(target)
        chosen = order[-r:] if low else order[:r]
        scale = self.scale_at(r)
        sizes = S[chosen] / (1.0 if self.selection == "released" else scale)
        start = LowRank.from_triplets(U[:, chosen], sizes, Vh[chosen])
        evidence |= {"singular_values": S[chosen], "direction_score": s[chosen].float()}
        return self.planned(target, decision, start, scale, evidence=evidence)

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts rank R, or the mean rank in shallow blocks."""
        if not self._shallow(target):
            return super().size(target, downs)
        r_avg, r_min, r_max = self._shares
        return self.size_at(target, min(max(r_avg, r_min), r_max, target.max_rank), assumed=True)

    @property
    def _shares(self) -> tuple[int, int, int]:
        """r_avg, r_min and r_max, none above R: no shallow target gets more than a deep one."""
        return min(self.r_avg, self.rank), min(self.r_min, self.rank), min(self.r_max, self.rank)

    def _shallow(self, target: Target) -> bool:
        if self.variant != "farss":
            return False
        assert self.boundary != "auto", "`fitted` decides it"
        return 0 <= target.layer < self.boundary
