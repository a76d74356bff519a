"""A budget on feature drift: hold what the targets put out on knowledge data, as hard as the budget needs, no harder.

    d_t  = tr(ΔW Ω ΔWᵀ) / tr(W Ω Wᵀ),   Ω = E[h hᵀ] over the tokens of the knowledge          (1)
    D_g  = mean of d_t over the targets t of a group g: the whole model, or one layer          (2)
    L    = L_task + sum_g λ_g D_g / budget_g                                                  (3)
    log λ_g <- log λ_g + rate · clip(log(D_g / budget_g), -1, 1)      after each step          (4)

d_t is the mean squared change of the target's output on knowledge inputs, relative to its size: free of units, from
r x r products (penalties/kronecker.py). (4) is dual ascent on the constraint D_g <= budget_g: λ_g falls while there is
room and rises while there is none, so that no strength needs to be found. ``per="layer"`` with ``layers="naie"`` gives
a layer that holds more of the answers (stats/tracing.py) a smaller budget: budget_g = budget · w̄ / w_g, where w̄ is the
harmonic mean of the weights w, so that the mean of the budgets is the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Factor, TargetPlan
from keeptune.linalg.factor import Identity, factor_from
from keeptune.penalties.base import OnChange, Site, Term, start_of
from keeptune.penalties.checks import check_counts
from keeptune.penalties.kronecker import KroneckerChange, quadratic_form
from keeptune.stats.factors import Covariance, input_request, read_factor
from keeptune.stats.request import DataRole, Request
from keeptune.stats.tracing import LayerEffect, layer_weights

__all__ = ["DriftBudget", "ascended"]

_MET = 0.2  # of the budget
_LEAST = 0.05  # of the largest weight: a layer without effect gets twenty times the budget, not an endless one


def ascended(log_multiplier: Tensor, drift: Tensor, budget: Tensor, rate: float) -> Tensor:
    """Take one step of (4).

    Laws: within the budget it falls, above it rises, by at most ``rate``; at the budget it stays.

    Args:
        log_multiplier: log λ, ``(groups,)``.
        drift: D, ``(groups,)``.
        budget: ``(groups,)``.
        rate: The largest step.

    Returns:
        The next log λ.
    """
    tiny = torch.finfo(drift.dtype).tiny
    return log_multiplier + rate * (drift.clamp_min(tiny) / budget).log().clamp(-1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Multiplied:
    """A term times λ over its budget; both change and are shared by the targets of a group.

    Args:
        term: d_t over the number of targets of its group.
        log_multiplier: log λ of all groups, changed in place by :meth:`DriftBudget.update`.
        budget: Of all groups.
        group: The target's.
    """

    term: Term
    log_multiplier: Tensor
    budget: Tensor
    group: int

    def value_and_grad(self, factors: Mapping[Factor, Tensor]) -> tuple[Tensor, Mapping[Factor, Tensor]]:
        """Compute the target's part of (3) and its gradient."""
        value, gradients = self.term.value_and_grad(factors)
        pressure = (self.log_multiplier[self.group].exp() / self.budget[self.group]).to(value)
        return value * pressure, {factor: gradient * pressure for factor, gradient in gradients.items()}


@dataclass(frozen=True)
class DriftBudget:
    """A budget on the relative feature drift, met by a multiplier that is found while training.

    Args:
        budget: The mean relative feature drift allowed; 0.005 is half a per cent of what targets put out.
        per: ``"model"`` holds the mean over all targets, ``"layer"`` that of each layer.
        layers: Of ``per="layer"``: ``"uniform"`` gives each layer the same budget, ``"naie"`` less where more of the
            answers sits; the knowledge then needs prompts and completions.
        rate: How far log λ moves in a step at most.
        start: λ at the first step.
        batches: How many batches of each knowledge set are used; None is all of it.
        batch_size: Examples per batch; it only says how much ``batches`` is.
        factor_rank: Keep this many directions of Ω, and one number for the others; None keeps all.
        trace_examples: How many examples of each knowledge set are traced (naie).

    Raises:
        PlanError: An option is out of range.
    """

    name: ClassVar[str] = "drift"
    paper: ClassVar[str] = "keeptune"
    strength: ClassVar[float] = 1.0
    state: ClassVar[tuple[str, ...]] = ("log multiplier",)

    budget: float = 0.005
    per: Literal["model", "layer"] = "model"
    layers: Literal["uniform", "naie"] = "uniform"
    rate: float = 0.1
    start: float = 1.0
    batches: int | None = None
    batch_size: int = 8
    factor_rank: int | None = None
    trace_examples: int | None = 32

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range.
        """
        for key in ("budget", "rate", "start"):
            value: float = getattr(self, key)
            if not 0 < value < float("inf"):
                raise PlanError(
                    f"penalty drift, {key}", got=str(value), wanted="a number above 0", next_step="Correct the value."
                )
        check_counts(
            self.name,
            batches=self.batches,
            batch_size=self.batch_size,
            factor_rank=self.factor_rank,
            trace_examples=self.trace_examples,
        )
        if self.layers == "naie" and self.per == "model":
            raise PlanError(
                "penalty drift",
                got="layers: naie with per: model",
                wanted="a budget for each layer",
                next_step="Set `per: layer`.",
            )

    @property
    def data(self) -> frozenset[DataRole]:
        """Need knowledge."""
        return frozenset({"knowledge"})

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Need Ω, and the effect of each layer where budgets follow it."""
        traced = {self._trace()} if self.layers == "naie" else set()
        return frozenset({self._inputs(), *traced})

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Keep Ω per input group, (1)'s denominator times the group's size, and what belongs to the groups."""
        target, one = site.plan.target, torch.ones((), device=site.weight.device)
        Omega = read_factor(self._inputs(), site.stats[self._inputs()]).to(torch.float32, site.weight.device)
        whole = float(quadratic_form(site.weight.double(), Omega.to(torch.float64), Identity(target.out_features, one)))
        groups = self._groups([peer.layer for peer in site.targets])
        size = sum(groups[peer.layer] == groups[target.layer] for peer in site.targets)
        budget = torch.tensor(self._budgets(site, groups), dtype=torch.float64)
        return {
            **Omega.tensors(f"Omega:{target.input_group}:"),
            f"share:{target.name}": torch.tensor(1 / (whole * size) if whole > 0 else 0.0),
            f"group:{target.name}": torch.tensor(groups[target.layer]),
            "budget": budget,
            "log multiplier": torch.full_like(budget, self.start).log(),
        }

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Make a target's part of (3)."""
        target, share = target_plan.target, tensors[f"share:{target_plan.target.name}"]
        drift = KroneckerChange(
            Omega=factor_from(tensors, f"Omega:{target.input_group}:"),
            Gamma=Identity(target.out_features, torch.ones_like(share)),
            scale=target_plan.scale,
            weight=share,
            start=start_of(target_plan, share.device),
        )
        group = int(tensors[f"group:{target.name}"])
        return Multiplied(OnChange(drift), tensors["log multiplier"], tensors["budget"], group)

    def update(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take the step of (4), in place.

        Args:
            tensors: The penalty's own.
            values: Target to its part of (3), as it was in this step.

        Returns:
            What to log: D and λ, of each group where there are several.
        """
        log_multiplier, budget = tensors["log multiplier"], tensors["budget"]
        parts = torch.zeros_like(budget)
        for name, value in values.items():
            parts[int(tensors[f"group:{name}"])] += value.to(parts)
        drift = parts * budget / log_multiplier.exp()
        logs = {f"feature_drift{_place(g, len(budget))}": drift[g].clone() for g in range(len(budget))}
        logs |= {f"multiplier{_place(g, len(budget))}": log_multiplier[g].exp() for g in range(len(budget))}
        log_multiplier.copy_(ascended(log_multiplier, drift, budget, self.rate))
        return logs

    def conclude(self, tensors: Mapping[str, Tensor], last: Mapping[str, float]) -> list[str]:
        """Say whether each budget was met within a fifth, was not used up, or was overdrawn."""
        budgets, said = tensors["budget"].tolist(), []
        for group, budget in enumerate(budgets):
            drift = last.get(f"feature_drift{_place(group, len(budgets))}")
            if drift is None:
                continue
            share = drift / budget
            verdict = "overdrawn" if share > 1 + _MET else "met" if share >= 1 - _MET else "not used up"
            where = f", group {group}" if len(budgets) > 1 else ""
            said.append(f"penalty drift{where}: {drift:.2g} of {budget:.2g} at the end, {verdict}")
        return said

    def _groups(self, layers: list[int]) -> dict[int, int]:
        return {layer: index if self.per == "layer" else 0 for index, layer in enumerate(sorted(set(layers)))}

    def _budgets(self, site: Site, groups: Mapping[int, int]) -> list[float]:
        if self.per == "model":
            return [self.budget]
        if self.layers == "uniform":
            return [self.budget] * len(groups)
        effects = site.stats.derive(self._trace(), layer_weights).clamp_min(_LEAST).tolist()
        weights = [effects[layer] if layer >= 0 else 1.0 for layer in groups]
        harmonic = len(weights) / sum(1 / weight for weight in weights)
        return [self.budget * harmonic / weight for weight in weights]

    def _inputs(self) -> Covariance:
        examples = None if self.batches is None else self.batches * self.batch_size
        return input_request("knowledge", self.factor_rank, examples=examples)

    def _trace(self) -> LayerEffect:
        return LayerEffect("knowledge", examples=self.trace_examples)


def _place(group: int, groups: int) -> str:
    return f"/group_{group}" if groups > 1 else ""
