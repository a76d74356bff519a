"""A budget on feature drift: hold what the targets put out on knowledge data, as hard as the budget needs, no harder.

    d_t  = tr(ΔW Ω ΔWᵀ) / tr(W Ω Wᵀ),   Ω = E[h hᵀ] over the tokens of the knowledge          (1)
    D    = mean of d_t over the targets t                                                     (2)
    L    = L_task + p D / budget                                                              (3)
    c    = clip(log(D / budget), -1, 1)
    log λ <- log λ + rate · c,   log p = log λ + gain · c     after each step                  (4)
    D    = sum of n/2 tr(Γ ΔW Ω ΔWᵀ) over the targets,  Γ = E[δ δᵀ]                           (5)

d_t is the mean squared change of the target's output on knowledge inputs, relative to its size: free of units, from
r x r products (penalties/kronecker.py). (4) is dual ascent on the constraint D <= budget: λ falls while there is
room and rises while there is none, so that there is no strength to choose. Its second half, the proportional part of a
PI controller in logarithms, damps it: the pressure p is off as soon as there is room again. With
``curvature="delta-kfac"`` the budget is in nats: (5) is the second order of the KL to the base, per token (δ is the
gradient at the target's output, n the tokens for each one with a loss).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.options import Range
from keeptune.core.plan import TargetPlan
from keeptune.penalties.base import Factors, Site, Term, on_factors, start_of
from keeptune.penalties.kronecker import KroneckerChange
from keeptune.penalties.measured import CovariancePenalty

_MET = 0.2  # of the budget


def excess(drift: Tensor, budget: Tensor) -> Tensor:
    """Computes c of (4), from -1 to 1: above 0 where the budget is overdrawn."""
    tiny = torch.finfo(drift.dtype).tiny
    return (drift.clamp_min(tiny) / budget).log().clamp(-1, 1)


def ascended(log_multiplier: Tensor, drift: Tensor, budget: Tensor, rate: float) -> Tensor:
    """Computes the next log λ (4).

    Laws: within the budget it falls, above it rises, by at most ``rate``; at the budget it stays.
    """
    return log_multiplier + rate * excess(drift, budget)


@dataclass(frozen=True)
class DriftBudget(CovariancePenalty):
    """A budget on the relative feature drift, met by a multiplier that adapts while training.

    Args:
        budget: The mean relative feature drift allowed; 0.005 is half a per cent of what targets put out.
        curvature: ``"delta-act"`` budgets the feature drift (1), ``"delta-kfac"`` nats per token (5), with ``labels``
            and ``rho``.
        rate: How far log λ moves in a step at most.
        gain: The proportional part: how far log p is from log λ at most.
        start: λ at the first step.

    Raises:
        PlanError: An option is out of range.
    """

    name = "drift"
    paper = "keeptune"
    state: ClassVar[tuple[str, ...]] = ("log multiplier", "log pressure")
    once = True
    ranges = {
        **dict.fromkeys(("budget", "rate", "start"), Range(above=0)),
        "gain": Range(least=0),
    }

    budget: float = 0.005
    curvature: Literal["delta-act", "delta-kfac"] = "delta-act"
    rate: float = 0.1
    gain: float = 2.0
    start: float = 1.0

    @property
    def by_loss(self) -> bool:
        """Whether the budget is in nats."""
        return self.curvature == "delta-kfac"

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Returns Ω per input group, Γ, what makes a form a target's part of D, and the controller's state."""
        tensors = self.measured(site)
        if self.by_loss:
            share = self.tokens_per_learned(site) / 2
        else:
            cost = self.cost_of_weights(site, tensors)
            share = 1 / cost if cost > 0 else 0.0
        budget = torch.tensor([self.budget], dtype=torch.float64)
        return {
            **tensors,
            f"share:{site.plan.target.name}": torch.tensor(share),
            "budget": budget,
            "log multiplier": torch.full_like(budget, self.start).log(),
            "log pressure": torch.full_like(budget, self.start).log() - self.gain,
        }

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Returns a target's part of (3): of D, times p over the budget."""
        share = tensors[f"share:{target_plan.target.name}"]
        Omega, Gamma = self.factors(target_plan.target, tensors, torch.ones_like(share))
        start = start_of(target_plan, share.device)
        drift = on_factors(KroneckerChange(Omega, Gamma, target_plan.scale, share, start).value_and_grad)
        log_pressure, budget = tensors["log pressure"], tensors["budget"]  # log p is changed in place by `update`

        def term(factors: Factors) -> tuple[Tensor, Factors]:
            value, gradients = drift(factors)
            pressure = log_pressure[0].exp().to(value) / budget[0].to(value)
            return value * pressure, {factor: gradient * pressure for factor, gradient in gradients.items()}

        return term

    def update(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Takes the step of (4); logs D, p, and each target's own d."""
        log_multiplier, log_pressure, budget = (tensors[k] for k in ("log multiplier", "log pressure", "budget"))
        value = torch.stack([part.to(budget) for part in values.values()]) * (budget / log_pressure.exp())
        drift = torch.zeros_like(budget).index_add_(0, torch.zeros_like(value, dtype=torch.long), value)
        own = value if self.by_loss else value * len(value)
        logs = {"feature_drift": drift[0], "multiplier": log_pressure[0].exp()}
        logs |= {f"feature_drift/{name}": own[index] for index, name in enumerate(values)}
        log_multiplier.copy_(ascended(log_multiplier, drift, budget, self.rate))
        log_pressure.copy_(log_multiplier + self.gain * excess(drift, budget))
        return logs

    def conclude(self, tensors: Mapping[str, Tensor], last: Mapping[str, float]) -> list[str]:
        """Returns whether the budget was met within a fifth, was not used up, or was overdrawn."""
        budget, drift = float(tensors["budget"]), last.get("feature_drift")
        if drift is None:
            return []
        share = drift / budget
        verdict = "overdrawn" if share > 1 + _MET else "met" if share >= 1 - _MET else "not used up"
        return [f"penalty drift: {drift:.2g} of {budget:.2g} at the end, {verdict}"]
