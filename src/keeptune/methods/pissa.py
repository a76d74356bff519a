"""PiSSA: train the principal part of W, freeze the rest.

Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
NeurIPS 2024.

    W = U S Vᵀ
    B = U_r sqrt(S_r),  A = sqrt(S_r) V_rᵀ         r largest triplets     (1, 2)
    W_res = W - B A                               frozen                 (3)
    y = (W_res + B A) x                                                  (4)

The paper calls B A and A B, for row vectors. With a scale s = alpha / r other than 1, S_r / s takes the place of S_r,
so that s B A is still the principal part.
"""

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import end_triplets
from keeptune.methods.base import ScaledMethod
from keeptune.statistics.collect import StatsView

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pissa(ScaledMethod):
    """PiSSA: starts from singular triplets of W, split into balanced factors and frozen in W without them."""

    name = "pissa"
    paper = "Meng et al., PiSSA, NeurIPS 2024"
    anchored = True
    end: ClassVar[Literal["top", "bottom"]] = "top"

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Splits one end of W's spectrum into balanced factors (1, 2)."""
        U, S, Vh = end_triplets(weight, decision.rank, self.end, target.name)
        zeros = int((1e-7 * weight.norm() >= S).sum())
        if zeros:  # both factors are zero there, and so are their gradients
            _log.warning(
                "%s: %d of the %d singular values it starts from are zero; these directions cannot be trained",
                target.name,
                zeros,
                len(S),
            )
        scale = self.scale_at(decision.rank)
        start = LowRank.from_triplets(U, S / scale, Vh)
        return self.planned(target, decision, start, scale, evidence={"singular_values": S.float()})
