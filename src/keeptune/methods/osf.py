"""OSF: train all of W but its top singular directions, with gradients that stay out of them.

Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025.

    W = U_high S_high V_highᵀ + U_low S_low V_lowᵀ          the first part is frozen, the second trained
    dU_low <- dU_low - U_high U_highᵀ dU_low
    dV_low <- dV_low - dV_low V_highᵀ V_high                (rows of V_low; projected gradients)

The layers and hooks are PEFT's. PEFT gives every weight the same share of frozen directions, where the paper
sets it by how much a layer changes its input. Only gradients are projected: Adam divides them entry by entry,
so that its steps leave the subspace again by a part; plain gradient descent does not.

The change is of rank min(m, n) at most and in general: there is no LoRA of it, the result is a whole model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import exact_svd
from keeptune.methods.base import Method, Size
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView


@dataclass(frozen=True)
class Osf(Method):
    """OSF.

    Args:
        preserve: Share of the min(m, n) singular directions that is frozen, from the top.
    """

    name = "osf"
    paper = "Nayak et al., Sculpting Subspaces, 2025"
    scope: ClassVar[Scope] = "subspace"
    strength_option = Strength(("preserve",), "odds")
    trains = frozenset({"U_low", "S_low", "V_low"})
    ranges = {"preserve": Range(above=0, below=1)}

    preserve: float = 0.5

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Trains the same share of every target; the rank is what is trained."""
        return {target: Decision(self._trained(target)) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Records the spectrum; PEFT decomposes W again at installation, since U_low and V_low are as large."""
        _, S, _ = exact_svd(weight, target.name)
        kept = (S[: -decision.rank] ** 2).sum() / (S**2).sum()
        nothing = LowRank(B=torch.zeros(target.out_features, 0), A=torch.zeros(0, target.in_features))
        return self.planned(
            target, decision, nothing, 1.0, evidence={"singular_values": S, "frozen_energy": kept[None]}
        )

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts a singular value and two singular vectors for each direction."""
        r, each = self._trained(target), target.out_features + target.in_features + 1
        return Size(r, r * each, frozen=(target.max_rank - r) * each)

    def _trained(self, target: Target) -> int:
        frozen = int(target.max_rank * self.preserve)
        if frozen == 0:
            raise PlanError(
                f"method {self.name}, target {target.name}",
                got=f"preserve {self.preserve}, which freezes none of {target.max_rank} directions",
                wanted="at least one",
                next_step=f"Raise `method.preserve`, or leave the role {target.role} out of `targets`.",
            )
        return target.max_rank - frozen
