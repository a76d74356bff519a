"""OPLoRA: LoRA whose change stays off the top singular directions of W, on both sides.

Xiong and Xie, "OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient
Fine-Tuning", AAAI 2026, 2510.13003.

    W = U S Vᵀ,   U_k, V_k: the k largest triplets
    P_L = I - U_k U_kᵀ,   P_R = I - V_k V_kᵀ                             (1)
    ΔW = s P_L B A P_R                                                   (2)
    U_kᵀ ΔW = 0,  ΔW V_k = 0:   (W + ΔW) v_i = s_i u_i,  (W + ΔW)ᵀ u_i = s_i v_i   for i = 1..k     (3)

Factors are kept projected, B = P_L B and A = A P_R, by every step (``training/projection.py``): the training of (2),
without its products at each token, and any checkpoint or merge holds (3). The triplets stay the largest ones as long as
the rest of W with ΔW has no singular value above s_k.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import end_triplets
from keeptune.methods.base import Size
from keeptune.methods.lora import LoraStart
from keeptune.statistics.collect import StatsView


@dataclass(frozen=True)
class Oplora(LoraStart):
    """OPLoRA.

    Args:
        k: How many singular triplets of each W stay as they are; 0 is plain LoRA.
    """

    name = "oplora"
    paper = "Xiong and Xie, OPLoRA, AAAI 2026"
    ranges = {"k": Range(least=0)}

    k: int = 16

    def allocate(self, scores: Mapping[Target, Any]) -> Mapping[Target, Decision]:
        """Decides on the same rank for all targets; PlanError where the k triplets leave no room for it."""
        decisions = super().allocate(scores)
        for target in scores:
            room = target.max_rank - self.rank
            wanted = f"at most {room} beside rank {self.rank} at {target.name}"
            self.need(self.k <= room, "k", wanted, f"Lower it, or leave the role {target.role} out of `targets`.")
        return decisions

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Draws A off V_k, with B zero, and keeps the directions (eqs. 1, 2)."""
        plan = super().build(target, weight, stats, decision)
        if not self.k:
            return plan
        U, S, Vh = (part.cpu() for part in end_triplets(weight, self.k, "top", target.name))
        A = plan.init.A.double()
        start = LowRank(B=plan.init.B, A=(A - A @ Vh.T @ Vh).float())
        kept = {"U": U.float(), "V": Vh.T.float().contiguous()}
        return replace(plan, init=start, kept=kept, evidence={"kept_singular_values": S.float()})

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts LoRA's factors, and the directions beside them."""
        return replace(super().size(target, downs), kept=self.k * (target.out_features + target.in_features))

    def training(self) -> Mapping[str, Any]:
        """Returns how many directions training stays off."""
        return {"kept_directions": self.k} if self.k else {}
