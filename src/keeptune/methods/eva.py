"""EVA: read the directions in which the task's inputs vary most, and give ranks to where they vary in few.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024.

    X = U S Vᵀ                                    inputs on task data, (tokens, n)  (1)
    A = V_rᵀ,  B = 0                              the r largest                     (2)
    ξ_j = s_j² / ‖X‖²                             explained variance                (3)
    ranks: the rank * targets largest ξ_j over all targets, at most rho * rank each (4)

As in the authors' code (PEFT's, incremental PCA), X is centred: V are the principal components, computed from
the covariance of all tokens, so nothing depends on batches or their order, and no convergence threshold is needed.
The scale alpha / rank is the same for every target whatever its rank, as PEFT keeps it. Targets that get no rank are
left alone. Nothing is taken out of W: the start is zero.

Targets that share an input have equal ξ; where the budget cuts through a tie, the first of them is served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import bottom_eigenvectors
from keeptune.methods.base import SCALING, RankMethod, Size, allot_rank, dropout_field
from keeptune.statistics.collect import StatsView
from keeptune.statistics.covariance import InputCovariance
from keeptune.statistics.input_mean import InputMean
from keeptune.statistics.request import Request

_COVARIANCE = InputCovariance("task")
_MEAN = InputMean("task")


def components(omega: Tensor, mean: tuple[float, ...], k: int) -> tuple[Tensor, Tensor]:
    """Computes the k leading principal components from ``E[h hᵀ] (n, n)`` and ``E[h]`` (1-3), float64.

    Laws: the columns of V are orthonormal; ξ descends, is not negative and sums to at most 1, to 1 for k = n.

    Returns:
        Explained variance ``ξ (k,)``, zeros for inputs that do not vary, and ``V (n, k)``.
    """
    mu = torch.tensor(mean, dtype=torch.float64)
    C = omega.double() - torch.outer(mu, mu)
    values, V = bottom_eigenvectors(-C, k)
    # Below float32 rounding of Ω there is no variance, only what centring leaves over.
    noise = 1e-6 * omega.double().trace()
    total = C.trace()
    return (-values).clamp_min(0) / total if total > noise else torch.zeros_like(values), V


def share_ranks(variance: Mapping[Target, Tensor], budget: int) -> dict[Target, int]:
    """Shares a budget out to the largest explained variances over all targets (4).

    Laws: ranks sum to ``min(budget, all there are)``; no target gets more than it has; no explained variance that is
    left out is above one that is taken; equal ones are taken in the order of the targets.

    Args:
        variance: ``ξ (k,)`` per target, descending.
        budget: The sum of ranks.
    """
    owners = [target for target, xi in variance.items() for _ in xi]
    order = torch.cat(list(variance.values())).argsort(descending=True, stable=True)
    ranks = Counter(owners[i] for i in order[:budget].tolist())
    return {target: ranks[target] for target in variance}


@dataclass(frozen=True)
class Eva(RankMethod):
    """EVA.

    Args:
        rank: Mean rank; the budget is rank times the number of targets.
        alpha: Scale numerator, over ``rank``; 1 in the paper.
        dropout: Dropout before A, during training.
        rho: The largest rank of a target is rho * rank; 1 means the same rank everywhere.
    """

    name = "eva"
    paper = "Paischer et al., EVA, 2024"
    ranges = {**SCALING, "rho": Range(least=1)}

    alpha: float = 1.0
    dropout: float = 0.0
    rho: float = 2.0

    @property
    def statistics(self) -> frozenset[Request]:
        """Mean and covariance of the inputs on the task."""
        return frozenset({_COVARIANCE, _MEAN})

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> Tensor:
        """Returns the explained variance of the inputs (3), as far as the target can use it."""
        allot_rank(target, self.rank, self.name)
        return self._components(target, stats)[0][: target.max_rank]

    def allocate(self, scores: Mapping[Target, Tensor]) -> Mapping[Target, Decision]:
        """Shares the budget out (4)."""
        return {t: Decision(rank) for t, rank in share_ranks(scores, self.rank * len(scores)).items()}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Takes the leading principal components (2)."""
        xi, V = self._components(target, stats)
        A = V[:, : decision.rank].T.float().contiguous()
        start = LowRank(B=torch.zeros(target.out_features, decision.rank), A=A)
        evidence = {"explained_variance": xi.float()}
        return self.planned(target, decision, start, self.alpha / self.rank, evidence=evidence)

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts the mean rank."""
        return self.size_at(target, min(self.rank, target.max_rank), assumed=True)

    def peft(self) -> Mapping[str, Any]:
        """Returns the dropout."""
        return dropout_field(self.dropout)

    def _components(self, target: Target, stats: StatsView) -> tuple[Tensor, Tensor]:
        mean = tuple(stats[_MEAN].tolist())
        k = min(round(self.rho * self.rank), target.in_features)
        return stats.derive(_COVARIANCE, components, mean, k)
