"""PiSSA: train the principal part of W, freeze the rest.

Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
NeurIPS 2024.

    W = U S Vᵀ
    B = U_r sqrt(S_r),  A = sqrt(S_r) V_rᵀ         r largest triplets     (1, 2)
    W_res = W - B A                               frozen                 (3)
    y = (W_res + B A) x                                                  (4)

The paper calls B A and A B, for row vectors. With a scale s = alpha / r other than 1, S_r / s takes the place of S_r,
so that s B A is still the principal part.

The paper's fast SVD is a randomised one (Halko et al. 2011) of ``niter`` iterations. What it misses stays in W_res,
so the model's output is unchanged all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.triplets import end_triplets, random_triplets
from keeptune.methods.base import allot_rank, check_scaling, dropout_field, generator_for, warn_of_zeros
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Pissa"]


@dataclass(frozen=True)
class Pissa:
    """PiSSA.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is r, the paper's scale of 1.
        dropout: Dropout before A, during training.
        svd: ``"exact"``, or ``"fast"``: randomised, for large models.
        niter: Iterations of the fast SVD; the paper uses 1 to 16.
        seed: Seed of the fast SVD; the recipe gives the training seed unless told otherwise.
    """

    name: ClassVar[str] = "pissa"
    paper: ClassVar[str] = "Meng et al., PiSSA, NeurIPS 2024"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    svd: Literal["exact", "fast"] = "exact"
    niter: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: alpha, dropout or niter is out of range.
        """
        check_scaling(self.alpha, self.dropout)
        if self.niter < 0:
            raise PlanError("method.niter", got=str(self.niter), wanted="0 or more", next_step="Correct the value.")

    def requests(self, target: Target) -> frozenset[Request]:
        """Need nothing."""
        return frozenset()

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> None:
        """Treat all targets alike."""

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Give every target the same rank."""
        return {target: allot_rank(target, self.rank, self.name) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Split W's principal part into balanced factors (1, 2)."""
        if self.svd == "exact":
            U, S, Vh = end_triplets(weight, decision.rank, "top", target.name)
        else:
            generator = generator_for(target, self.seed)
            U, S, Vh = random_triplets(weight, decision.rank, niter=self.niter, generator=generator)
        warn_of_zeros(target, S, weight)
        scale = 1.0 if self.alpha is None else self.alpha / decision.rank
        return TargetPlan(
            target=target,
            decision=decision,
            init=LowRank.from_triplets(U, S / scale, Vh),
            scale=scale,
            trainable=frozenset({"A", "B"}),
            evidence={"singular_values": S.float()},
        )

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)
