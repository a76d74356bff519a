"""keep: LoRA under a budget on what it changes for knowledge. keeptune's own (docs/guides/keep.md).

    y = W x + s B A x                                     LoRA: A random, B = 0                       (1)
    min L_task   subject to   D <= budget                 by dual ascent (penalties/drift.py)         (2)
    D = mean_t tr(ΔW Ω ΔWᵀ) / tr(W Ω Wᵀ)                  relative feature drift on knowledge         (3)
    D = sum_t n/2 tr(Γ ΔW Ω ΔWᵀ)                          the KL to the base to second order,         (4)
                                                          nats per token

Ω = E[h hᵀ] of a target's inputs, Γ = E[δ δᵀ] of the gradients at its outputs (by probes, model/summed_loss.py), damped
towards the identity of its trace; n is the number of tokens for each one with a loss. Knowledge data pass through the
base once, for (4) backward as well. Training needs r x r products and one n x r product per target besides. There is
no strength to tune: a budget of 0.003 nats says by how much the answers to the knowledge may move.
"""

from __future__ import annotations

from dataclasses import dataclass

from keeptune.core.errors import PlanError
from keeptune.methods.lora import LoraStart
from keeptune.methods.strength import Strength
from keeptune.penalties.drift import DriftBudget
from keeptune.penalties.measured import FactorOptions

_NATS = 0.003


@dataclass(frozen=True)
class Keep(FactorOptions, LoraStart):
    """LoRA under a budget.

    Args:
        nats: The budget in nats per token, to second order (4); 0.003 unless ``drift`` is set.
        drift: In place of it, the mean relative feature drift allowed (3): no backward pass, and a cheaper step.
        rate: The largest step of the multiplier's logarithm.
        gain: The largest difference between the logarithms of the pressure and of the multiplier.

    Raises:
        PlanError: An option is out of range, or there are two budgets.
    """

    name = "keep"
    paper = "keeptune"
    strength_option = Strength(("drift", "nats"), "divided", default=_NATS)

    nats: float | None = None
    drift: float | None = None
    rho: float = 0.5
    rate: float = 0.1
    gain: float = 2.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            PlanError: One is out of range, or there are two budgets.
        """
        super().__post_init__()
        if self.nats is not None and self.drift is not None:
            raise PlanError(
                "method keep",
                got=f"nats: {self.nats} and drift: {self.drift}",
                wanted="one budget",
                next_step="Leave one out; a second may stand under `penalties` as {name: drift, budget: ...}.",
            )
        self.penalties()

    def penalties(self) -> tuple[DriftBudget]:
        """Returns the budget."""
        if self.drift is None:
            return (DriftBudget.of(self, budget=_NATS if self.nats is None else self.nats, curvature="delta-kfac"),)
        return (DriftBudget.of(self, budget=self.drift, rho=0.0),)
