"""keep: LoRA under a budget on what it changes for knowledge. keeptune's own (docs/guides/keep.md).

    y = W x + s B A x                                     LoRA: A random, B = 0                       (1)
    min L_task   subject to   D <= budget                 by dual ascent (penalties/drift.py)         (2)
    D = mean_t tr(ΔW Ω ΔWᵀ) / tr(W Ω Wᵀ)                  relative feature drift on knowledge         (3)
    D = sum_t n/2 tr(Γ ΔW Ω ΔWᵀ)                          the KL to the base to second order,         (4)
                                                          nats per token

Ω = E[h hᵀ] of a target's inputs, Γ = E[δ δᵀ] of the gradients at its outputs (labels drawn from the model), damped
towards the identity of its trace; n is the number of tokens for each one with a loss. Knowledge data pass through the
base once, for (4) backward as well. Training needs r x r products and one n x r product per target besides. There is
no strength to tune: a budget of 0.003 nats says by how much the answers to the knowledge may move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import allot_rank, check_scaling, dropout_field
from keeptune.methods.lora import lora_start, scale_of
from keeptune.methods.strength import Strength
from keeptune.penalties.drift import DriftBudget
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Keep"]


_NATS = 0.003


@dataclass(frozen=True)
class Keep:
    """LoRA under a budget.

    Args:
        rank: r, at every target.
        alpha: Scale numerator; None is 2 r, the usual choice.
        nats: The budget in nats per token, to second order (4); 0.003 unless ``drift`` is given.
        drift: In place of it, the mean relative feature drift allowed (3): no backward pass, and a cheaper step.
        per: ``"model"`` holds all targets together, ``"layer"`` each layer by itself.
        layers: Of ``per="layer"``: ``"uniform"`` budgets, or by ``"naie"`` or ``"kva"``.
        rho: Of ``nats``: damping of Γ towards the identity of its trace.
        rate: How far the logarithm of the multiplier moves in a step at most.
        gain: How far the logarithm of the pressure is from that of the multiplier at most.
        factor_rank: Keep this many directions of Ω and Γ, and one number for the others; None keeps all.
        dropout: Dropout before A, during training.
        seed: Seed of A; the recipe gives the training seed unless told otherwise.

    Raises:
        PlanError: An option is out of range, or there are two budgets.
    """

    name: ClassVar[str] = "keep"
    paper: ClassVar[str] = "keeptune"
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = Strength(("drift", "nats"), "divided", default=_NATS)

    rank: int = 8
    alpha: float | None = None
    nats: float | None = None
    drift: float | None = None
    per: Literal["model", "layer"] = "model"
    layers: Literal["uniform", "naie", "kva"] = "uniform"
    rho: float = 0.5
    rate: float = 0.1
    gain: float = 2.0
    factor_rank: int | None = None
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range, or there are two budgets.
        """
        check_scaling(self.alpha, self.dropout)
        if self.nats is not None and self.drift is not None:
            raise PlanError(
                "method keep",
                got=f"nats: {self.nats} and drift: {self.drift}",
                wanted="one budget",
                next_step="Leave one out; a second may stand under `penalties` as {name: drift, budget: ...}.",
            )
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
        """Ask for the budget."""
        in_nats = self.drift is None
        return (
            DriftBudget(
                budget=(_NATS if self.nats is None else self.nats) if self.drift is None else self.drift,
                per=self.per,
                layers=self.layers,
                curvature="delta-kfac" if in_nats else "delta-act",
                rho=self.rho if in_nats else 0.0,
                rate=self.rate,
                gain=self.gain,
                factor_rank=self.factor_rank,
            ),
        )
