"""A budget on feature drift: hold what the targets put out on knowledge data, as hard as the budget needs, no harder.

    d_t  = tr(ΔW Ω ΔWᵀ) / tr(W Ω Wᵀ),   Ω = E[h hᵀ] over the tokens of the knowledge          (1)
    D_g  = mean of d_t over the targets t of a group g: the whole model, or one layer          (2)
    L    = L_task + sum_g p_g D_g / budget_g                                                  (3)
    c_g  = clip(log(D_g / budget_g), -1, 1)
    log λ_g <- log λ_g + rate · c_g,   log p_g = log λ_g + gain · c_g     after each step      (4)
    D_g  = groups · sum of n/2 tr(Γ ΔW Ω ΔWᵀ) over the targets of g,  Γ = E[δ δᵀ]             (5)

d_t is the mean squared change of the target's output on knowledge inputs, relative to its size: free of units, from
r x r products (penalties/kronecker.py). (4) is dual ascent on the constraint D_g <= budget_g: λ_g falls while there is
room and rises while there is none, so that there is no strength to choose. Its second half, the proportional part of a
PI controller in logarithms, damps it: the pressure p_g is off as soon as there is room again. With
``curvature="delta-kfac"`` the budget is in nats: (5) is the second order of the KL to the base, per token (δ is the
gradient at the target's output, n the tokens for each one with a loss).

``per="layer"`` with ``layers="naie"`` or ``"kva"`` gives a layer that holds more of the answers
(``statistics/layer_effect.py``, ``statistics/neuron_attribution.py``) a smaller budget: budget_g = budget · w̄ / w_g,
where w̄ is the harmonic mean of the weights w, so that the mean of the budgets is the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.options import Range
from keeptune.core.plan import TargetPlan
from keeptune.linalg.symmetric import Identity, PsdMatrix, psd_matrix_from
from keeptune.penalties.base import Factors, Site, Term, on_factors, start_of
from keeptune.penalties.kronecker import KroneckerChange, quadratic_form
from keeptune.penalties.measured import CovariancePenalty
from keeptune.statistics.layer_effect import LayerEffect, layer_weights
from keeptune.statistics.neuron_attribution import Attributions, NeuronAttribution, layer_profile
from keeptune.statistics.request import Request

_MET = 0.2  # of the budget
_LEAST = 0.05  # of the largest weight: a layer without effect gets twenty times the budget, not an endless one


def excess(drift: Tensor, budget: Tensor) -> Tensor:
    """Computes c of (4) of each group, from -1 to 1: above 0 where the budget is overdrawn."""
    tiny = torch.finfo(drift.dtype).tiny
    return (drift.clamp_min(tiny) / budget).log().clamp(-1, 1)


def ascended(log_multiplier: Tensor, drift: Tensor, budget: Tensor, rate: float) -> Tensor:
    """Computes the next log λ (4) of each group, ``(groups,)``.

    Laws: within the budget it falls, above it rises, by at most ``rate``; at the budget it stays.
    """
    return log_multiplier + rate * excess(drift, budget)


@dataclass(frozen=True)
class DriftBudget(CovariancePenalty):
    """A budget on the relative feature drift, met by a multiplier that adapts while training.

    Args:
        budget: The mean relative feature drift allowed; 0.005 is half a per cent of what targets put out.
        per: ``"model"`` holds the mean over all targets, ``"layer"`` that of each layer.
        layers: Of ``per="layer"``: ``"uniform"`` is the same budget for each layer, ``"naie"`` less where more of the
            answers sits by causal tracing; the knowledge then needs prompts and completions. ``"kva"`` less where the
            MLP carries more of the next token (LoKI's attribution).
        curvature: ``"delta-act"`` budgets the feature drift (1), ``"delta-kfac"`` nats per token (5), with ``labels``
            and ``rho``.
        rate: How far log λ moves in a step at most.
        gain: The proportional part: how far log p is from log λ at most.
        start: λ at the first step.
        trace_examples: How many examples of each knowledge set are traced (naie, kva).

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
        "trace_examples": Range(least=1),
    }

    budget: float = 0.005
    per: Literal["model", "layer"] = "model"
    layers: Literal["uniform", "naie", "kva"] = "uniform"
    curvature: Literal["delta-act", "delta-kfac"] = "delta-act"
    rate: float = 0.1
    gain: float = 2.0
    start: float = 1.0
    trace_examples: int | None = 32

    def __post_init__(self) -> None:
        """Checks the options, also against each other."""
        super().__post_init__()
        alike = self.layers == "uniform" or self.per == "layer"
        self.need(alike, "layers", "uniform with `per: model`: there is one budget", "Set `per: layer`.")

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Returns Ω, Γ for nats, and the effect of each layer where budgets follow it."""
        traced: set[Request] = set() if self.layers == "uniform" else {self._trace}
        outputs = {self.gradients(target_plan.target), self.count} if self.curvature == "delta-kfac" else set()
        return frozenset({self.inputs(target_plan.target), *outputs, *traced})

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Returns Ω per input group, Γ, what makes a form a target's part of D, and what belongs to the groups."""
        target = site.plan.target
        Omega = self.read(self.inputs(target), site)
        groups = self._groups([peer.layer for peer in site.targets])
        tensors = dict(Omega.tensors(f"Omega:{target.input_group}:"))
        if self.curvature == "delta-kfac":
            Gamma = self.read(self.gradients(target), site)
            tensors |= Gamma.damped(self.rho).tensors(f"Gamma:{target.name}:")
            share = len(set(groups.values())) / 2 * self.tokens_per_learned(site)
        else:
            identity = Identity(target.out_features, torch.ones((), device=site.weight.device))
            whole = float(quadratic_form(site.weight.double(), Omega.to(torch.float64), identity))
            size = sum(groups[peer.layer] == groups[target.layer] for peer in site.targets)
            share = 1 / (whole * size) if whole > 0 else 0.0
        budget = torch.tensor(self._budgets(site, groups), dtype=torch.float64)
        return {
            **tensors,
            f"share:{target.name}": torch.tensor(share),
            f"group:{target.name}": torch.tensor(groups[target.layer]),
            "budget": budget,
            "log multiplier": torch.full_like(budget, self.start).log(),
            "log pressure": torch.full_like(budget, self.start).log() - self.gain,
        }

    def size(self, target_plan: TargetPlan) -> Mapping[str, int]:
        """Returns that of Ω, which an input group shares, and of Γ."""
        target = target_plan.target
        return self.factor_sizes(target, inputs=True, gradients=self.curvature == "delta-kfac")

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Returns a target's part of (3): of D, times p over its budget, which the targets of a group share."""
        target, share = target_plan.target, tensors[f"share:{target_plan.target.name}"]
        Gamma: PsdMatrix = Identity(target.out_features, torch.ones_like(share))
        if self.curvature == "delta-kfac":
            Gamma = psd_matrix_from(tensors, f"Gamma:{target.name}:")
        change = KroneckerChange(
            Omega=psd_matrix_from(tensors, f"Omega:{target.input_group}:"),
            Gamma=Gamma,
            scale=target_plan.scale,
            weight=share,
            start=start_of(target_plan, share.device),
        )
        drift, group = on_factors(change.value_and_grad), int(tensors[f"group:{target.name}"])
        log_pressure, budget = tensors["log pressure"], tensors["budget"]  # log p is changed in place by `update`

        def term(factors: Factors) -> tuple[Tensor, Factors]:
            value, gradients = drift(factors)
            pressure = log_pressure[group].exp().to(value) / budget[group].to(value)
            return value * pressure, {factor: gradient * pressure for factor, gradient in gradients.items()}

        return term

    def update(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Takes the step of (4); logs D and p, of each group where there are several, and each target's own d."""
        log_multiplier, log_pressure, budget = (tensors[k] for k in ("log multiplier", "log pressure", "budget"))
        group = torch.stack([tensors[f"group:{name}"].to(budget.device) for name in values])
        value = torch.stack([part.to(budget) for part in values.values()]) * (budget / log_pressure.exp())[group]
        drift = torch.zeros_like(budget).index_add_(0, group, value)
        own = value if self.curvature == "delta-kfac" else value * torch.bincount(group, minlength=len(budget))[group]
        logs = {f"feature_drift{_place(g, len(budget))}": drift[g] for g in range(len(budget))}
        logs |= {f"multiplier{_place(g, len(budget))}": log_pressure[g].exp() for g in range(len(budget))}
        logs |= {f"feature_drift/{name}": own[index] for index, name in enumerate(values)}
        log_multiplier.copy_(ascended(log_multiplier, drift, budget, self.rate))
        log_pressure.copy_(log_multiplier + self.gain * excess(drift, budget))
        return logs

    def conclude(self, tensors: Mapping[str, Tensor], last: Mapping[str, float]) -> list[str]:
        """Returns whether each budget was met within a fifth, was not used up, or was overdrawn."""
        budgets, sentences = tensors["budget"].tolist(), []
        for group, budget in enumerate(budgets):
            drift = last.get(f"feature_drift{_place(group, len(budgets))}")
            if drift is None:
                continue
            share = drift / budget
            verdict = "overdrawn" if share > 1 + _MET else "met" if share >= 1 - _MET else "not used up"
            where = f", group {group}" if len(budgets) > 1 else ""
            sentences.append(f"penalty drift{where}: {drift:.2g} of {budget:.2g} at the end, {verdict}")
        return sentences

    def _groups(self, layers: list[int]) -> dict[int, int]:
        return {layer: index if self.per == "layer" else 0 for index, layer in enumerate(sorted(set(layers)))}

    def _budgets(self, site: Site, groups: Mapping[int, int]) -> list[float]:
        if self.per == "model":
            return [self.budget]
        if self.layers == "uniform":
            return [self.budget] * len(groups)
        weigh = _traced_weights if self.layers == "naie" else _attributed_weights
        effects = site.stats.derive(self._trace, weigh)
        weights = [max(effects.get(layer, 1.0), _LEAST) for layer in groups]
        harmonic = len(weights) / sum(1 / weight for weight in weights)
        return [self.budget * harmonic / weight for weight in weights]

    @property
    def _trace(self) -> LayerEffect | NeuronAttribution:
        kind = LayerEffect if self.layers == "naie" else NeuronAttribution
        return kind("knowledge", examples=self.trace_examples)


def _traced_weights(effects: Tensor) -> dict[int, float]:
    return dict(enumerate(layer_weights(effects).tolist()))


def _attributed_weights(attributions: Attributions) -> dict[int, float]:
    """Weighs the blocks that have an MLP; the others have no weight."""
    return dict(zip(attributions.layers, layer_profile(attributions).tolist(), strict=True))


def _place(group: int, groups: int) -> str:
    return f"/group_{group}" if groups > 1 else ""
