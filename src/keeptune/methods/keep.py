"""keep: LoRA under a budget on what it changes for knowledge. keeptune's own.

    y = W x + s B A x                                     LoRA: A random, B = 0                       (1)
    d_t = tr(ΔW Ω ΔWᵀ) / tr(W Ω Wᵀ),   Ω = E[h hᵀ]         relative feature drift on knowledge         (2)
    min L_task   subject to   mean_t d_t <= drift         by dual ascent (penalties/drift.py)         (3)

Knowledge data pass through the base once, without labels and without a backward pass; training needs r x r products
and one n x r product per input group besides. There is no strength to tune: a drift of 0.005 says that what the targets
put out on knowledge moves by half a per cent of its mean square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import allot_rank, check_scaling, dropout_field
from keeptune.methods.lora import lora_start, scale_of
from keeptune.penalties.drift import DriftBudget
from keeptune.stats.collect import StatsView
from keeptune.stats.request import Request

__all__ = ["Keep"]


@dataclass(frozen=True)
class Keep:
    """LoRA under a drift budget.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is 2 r, the usual choice.
        drift: The mean relative feature drift allowed.
        per: ``"model"`` holds the mean over all targets, ``"layer"`` that of each layer.
        layers: Of ``per="layer"``: ``"uniform"`` budgets, or by ``"naie"`` or ``"kva"``.
        curvature: ``"delta-act"`` budgets the feature drift; with ``"delta-kfac"`` ``drift`` is in nats per token, the
            second order of the KL to the base, and knowledge data pass backward once as well.
        rho: Of ``"delta-kfac"``: damping of Γ towards the identity of its trace.
        rate: How far the logarithm of the multiplier moves in a step at most.
        gain: How far the logarithm of the pressure is from that of the multiplier at most.
        factor_rank: Keep this many directions of Ω, and one number for the others; None keeps all.
        dropout: Dropout before A, during training.
        seed: Seed of A; the recipe gives the training seed unless told otherwise.

    Raises:
        PlanError: An option is out of range.
    """

    name: ClassVar[str] = "keep"
    paper: ClassVar[str] = "keeptune"
    scope: ClassVar[Scope] = "adapter"

    rank: int = 8
    alpha: float | None = None
    drift: float = 0.005
    per: Literal["model", "layer"] = "model"
    layers: Literal["uniform", "naie", "kva"] = "uniform"
    curvature: Literal["delta-act", "delta-kfac"] = "delta-act"
    rho: float = 0.5
    rate: float = 0.1
    gain: float = 2.0
    factor_rank: int | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range.
        """
        check_scaling(self.alpha, self.dropout)
        self.penalties()

    def requests(self, target: Target) -> frozenset[Request]:
        """Need nothing for the factors; the budget asks for itself."""
        return frozenset()

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> None:
        """Treat all targets alike."""

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Give every target the same rank."""
        return {target: allot_rank(target, self.rank, self.name) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Start as LoRA does (1)."""
        return lora_start(target, decision, self.seed, scale_of(decision.rank, self.alpha))

    def peft(self) -> Mapping[str, Any]:
        """Hand dropout to PEFT."""
        return dropout_field(self.dropout)

    def penalties(self) -> tuple[DriftBudget]:
        """Ask for (3)."""
        return (
            DriftBudget(
                budget=self.drift,
                per=self.per,
                layers=self.layers,
                curvature=self.curvature,
                rho=self.rho,
                rate=self.rate,
                gain=self.gain,
                factor_rank=self.factor_rank,
            ),
        )
