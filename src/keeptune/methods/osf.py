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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.svd import exact_svd
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Osf"]


@dataclass(frozen=True)
class Osf:
    """OSF.

    Args:
        preserve: Share of the min(m, n) singular directions that is frozen, from the top.
    """

    name: ClassVar[str] = "osf"
    paper: ClassVar[str] = "Nayak et al., Sculpting Subspaces, 2025"
    scope: ClassVar[Scope] = "subspace"
    strength_option: ClassVar[Strength | None] = Strength(("preserve",), "odds")

    preserve: float = 0.5

    def __post_init__(self) -> None:
        """Check the option.

        Raises:
            PlanError: preserve is not between 0 and 1.
        """
        if not 0 < self.preserve < 1:
            raise PlanError(
                "method.preserve", got=str(self.preserve), wanted="above 0 and below 1", next_step="Correct the value."
            )

    def requests(self, target: Target) -> frozenset[Request]:
        """Need nothing."""
        return frozenset()

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> None:
        """Treat all targets alike."""

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Train the same share of every target; the rank is what is trained."""
        return {target: Decision(target.max_rank - self._frozen(target)) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Show the spectrum; PEFT decomposes W again when the plan is installed, since U_low and V_low are as large."""
        _, S, _ = exact_svd(weight, target.name)
        kept = (S[: -decision.rank] ** 2).sum() / (S**2).sum()
        return TargetPlan(
            target=target,
            decision=decision,
            init=LowRank(B=torch.zeros(target.out_features, 0), A=torch.zeros(0, target.in_features)),
            scale=1.0,
            trainable=frozenset({"U_low", "S_low", "V_low"}),
            evidence={"singular_values": S, "frozen_energy": kept[None]},
        )

    def peft(self) -> Mapping[str, Any]:
        """Need nothing more from PEFT."""
        return {}

    def _frozen(self, target: Target) -> int:
        frozen = int(target.max_rank * self.preserve)
        if frozen == 0:
            raise PlanError(
                f"method {self.name}, target {target.name}",
                got=f"preserve {self.preserve}, which freezes none of {target.max_rank} directions",
                wanted="at least one",
                next_step=f"Raise `method.preserve`, or leave the role {target.role} out of `targets`.",
            )
        return frozen
