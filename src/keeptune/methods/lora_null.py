"""LoRA-Null: start the adapter in the null space of what the model reads when it recalls knowledge.

Tang et al., "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models", 2025.

X (n x N) are a target's inputs on knowledge data, Ω = X Xᵀ / N their covariance.

    B A X ≈ 0  if  A X ≈ 0                                               (5, 6)
    U_null: the r left singular vectors of X with the smallest singular values
            = the eigenvectors of Ω with the smallest eigenvalues        (7-9)
    W0 U_null U_nullᵀ = U' S' V'ᵀ                                         (10)
    B = U' sqrt(S'),  A = sqrt(S') V'ᵀ                                    (11, 12)
    W0' = W0 - B A                                                       (residual, frozen)

v1 trains A and B; v2 freezes A, so B A X stays ≈ 0 for every B (14).

(10) is computed from the thin SVD of W0 U_null, and Ω and its bottom in float64: the released code accumulates
Ω in float16, where the bottom of the spectrum is rounding noise (``docs/methods/lora-null.md``).
The paper has no alpha: the scale is 1. The paper says "column space" of A in Theorem 1; it is the row space.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import bottom_eigenvectors, projected_svd
from keeptune.methods.base import RankMethod, Size
from keeptune.statistics.collect import StatsView
from keeptune.statistics.covariance import InputCovariance, ReleasedCovariance
from keeptune.statistics.request import Request

_log = logging.getLogger(__name__)


def null_factors(W: Tensor, U: Tensor) -> tuple[LowRank, Tensor]:
    """Splits the part of W that reads span(U) into balanced factors (eqs. 10-12); returns them and S ``(r,)``.

    Laws: ``B A == W U Uᵀ``; ``A Aᵀ == Bᵀ B == diag(S)``; the rows of A lie in span(U), U ``(n, r)`` orthonormal.
    """
    P, S, Vh = projected_svd(W, U.float())  # float32 as W is; only the search for U needs float64
    return LowRank.from_triplets(P, S, Vh), S


def null_space(omega: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Computes U_null of Ω ``(n, n)`` (eqs. 7-9).

    Returns:
        The variances relative to the mean one ``(r,)``, ascending, and the directions ``(n, r)``, float64.
    """
    values, U = bottom_eigenvectors(omega, r)
    return _relative(values, omega), U


def released_null_space(omega: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Returns the last r left singular vectors of a float32 SVD of Ω, as the released code does.

    Of a float16 sum a good part of the small eigenvalues is negative; an SVD ranks them by size.

    Returns:
        The singular values relative to the mean variance ``(r,)``, descending, and the vectors ``(n, r)``.
    """
    U, S, _ = torch.linalg.svd(omega)
    return _relative(S[-r:], omega), U[:, -r:].contiguous()


def _relative(values: Tensor, omega: Tensor) -> Tensor:
    return (values.clamp_min(0) / omega.double().diagonal().mean().clamp_min(1e-300)).float()


@dataclass(frozen=True)
class LoraNull(RankMethod):
    """LoRA-Null.

    Args:
        variant: ``"v1"`` trains A and B, ``"v2"`` trains B only.
        covariance: ``"exact"``, or ``"released"``: the released code's float16 sums of rescaled inputs, its
            float32 SVD that ranks eigenvalues by size whatever their sign, and factors rounded to float16.
        biases: Train the biases of targets that have one too (not those of fused experts), as the released code does.
    """

    name = "lora-null"
    paper = "Tang et al., LoRA-Null, 2025"
    anchored = True

    variant: Literal["v1", "v2"] = "v1"
    covariance: Literal["exact", "released"] = "exact"
    biases: bool = False

    @classmethod
    def as_released(cls, rank: int = 128, variant: Literal["v1", "v2"] = "v1") -> Self:
        """Returns what the authors' repository does; its data are packed random windows of 2,048 tokens of NQ-open."""
        return cls(rank=rank, variant=variant, covariance="released", biases=True)

    @property
    def trains(self) -> frozenset[str]:
        """A and B, or B only."""
        return frozenset({"A", "B"} if self.variant == "v1" else {"B"})

    @property
    def _request(self) -> Request:
        if self.covariance == "released":
            return ReleasedCovariance("knowledge")
        return InputCovariance("knowledge", precision="double")

    @property
    def statistics(self) -> frozenset[Request]:
        """The input covariance on knowledge data."""
        return frozenset({self._request})

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Computes the null space and splits the part of W that reads it (eqs. 7-12)."""
        search = null_space if self.covariance == "exact" else released_null_space
        variance, U = stats.derive(self._request, search, decision.rank)
        init, S = null_factors(weight, U)
        if self.covariance == "released":
            init = init.to(torch.float16).to(torch.float32)
        if S[-1] <= 1e-6 * S[0]:
            # A's last rows are zero there; v2 could never use them.
            used = int((1e-6 * S[0] < S).sum())
            _log.warning("%s: W reads only %d of the %d null directions", target.name, used, len(S))
        evidence = {"null_variance": variance.clone(), "singular_values": S}  # safetensors shares no memory
        own = ["bias"] if self._bias_of(target) else []
        vectors = {name: torch.zeros(target.out_features) for name in own}
        trainable = self.trains.union(own)
        return self.planned(target, decision, init, 1.0, evidence=evidence, trainable=trainable, vectors=vectors)

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts the factors, and a trained bias."""
        size = super().size(target, downs)
        return replace(size, trained=size.trained + target.out_features) if self._bias_of(target) else size

    def _bias_of(self, target: Target) -> bool:
        return self.biases and target.bias and target.expert is None
