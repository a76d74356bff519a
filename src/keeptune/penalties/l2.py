"""L2: hold the size of the weight change, or of the factors, with a weight per layer.

Zhang, Xie, Zhang, "L2-LoRA: Improving Low-Rank Adaptation with Layer-Specific Regularization".

    P = eta sum_l lambda_l ‖ΔW_l‖²               ΔW = s (B A - B_0 A_0), Frobenius         (7)
    P = eta sum_l lambda_l (‖A_l‖² + ‖B_l‖²)     on the trained parameters themselves       (5)
    ‖B A‖² = sum((BᵀB) ∘ (A Aᵀ))                                                            (a)

The two equations are not the same penalty; (7) does not depend on how a change is split into factors. The paper
gives no eta, and an absolute one means something else for every model. ``unit="relative"`` therefore takes

    P = eta mean_t lambda_l(t) ‖ΔW_t‖² / ‖W_t‖²                                             (b)

over the targets t: the mean squared relative change; on the factors, against their squares at the start.
``unit="absolute"`` is (7), or (5), as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan, TargetPlan
from keeptune.linalg.symmetric import Identity
from keeptune.penalties.base import OnChange, OnFactors, Site, Term, start_of
from keeptune.penalties.kronecker import KroneckerChange
from keeptune.penalties.layer_weights import check_layers, cubic_weights
from keeptune.penalties.option_checks import check_strength
from keeptune.statistics.layer_effect import LayerEffect, Reading, layer_weights
from keeptune.statistics.request import DataRole, Request

__all__ = ["L2", "FactorNorm", "Layers"]

Layers = Literal["uniform", "cubic", "naie"] | tuple[float, ...]
_MEASURED = "layer weights"


@dataclass(frozen=True, slots=True, eq=False)
class FactorNorm:
    """``w (‖A‖² + ‖B‖²)`` (eq. 5).

    Args:
        weight: w, a number or a scalar tensor.
    """

    weight: float | Tensor

    def value(self, delta: LowRank) -> Tensor:
        """Compute it."""
        return self.weight * (delta.A.square().sum() + delta.B.square().sum())

    def value_and_grad(self, delta: LowRank) -> tuple[Tensor, LowRank]:
        """Compute it; the gradients are ``2 w B`` and ``2 w A``."""
        return self.value(delta), LowRank(B=2 * self.weight * delta.B, A=2 * self.weight * delta.A)


@dataclass(frozen=True)
class L2:
    """The squared size of the change, weighted by layer.

    Args:
        strength: eta. With the relative unit, what a change as large as W itself costs, in nats.
        layers: Weight of each block: ``"uniform"``, ``"cubic"`` (eq. 8), ``"naie"`` (eqs. 2 and 3, measured on the
            knowledge, which then needs prompts and completions), or a list, from block 0.
        on: ``"change"`` takes ``s B A`` (eq. 7), ``"factors"`` A and B (eq. 5).
        unit: ``"relative"`` measures each change against its W (b), and factors against their start; ``"absolute"``
            takes the equation as it is.
        first: l_i as a share of the depth (cubic).
        last: l_f as a share of the depth (cubic).
        floor: tau, the least weight (cubic).
        reading: Which reading of eq. 2 (naie).
        noise_fraction: Share of a prompt's tokens that get noise (naie).
        noise_scale: Its standard deviation, in units of that of the token embeddings (naie).
        noise_seed: Its seed (naie).
        trace_examples: How many examples of each knowledge set are traced, the first ones (naie).

    Raises:
        PlanError: An option is out of range.
    """

    name: ClassVar[str] = "l2"
    paper: ClassVar[str] = "Zhang et al., L2-LoRA"

    strength: float = 100.0
    layers: Layers = "uniform"
    on: Literal["change", "factors"] = "change"
    unit: Literal["relative", "absolute"] = "relative"
    first: float = 1 / 3
    last: float = 2 / 3
    floor: float = 0.0
    reading: Reading = "positions"
    noise_fraction: float = 0.5
    noise_scale: float = 3.0
    noise_seed: int = 0
    trace_examples: int | None = 32

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range.
        """
        check_strength(self.strength, self.name)
        check_layers(self.layers, "penalty l2, layers")
        if not 0 <= self.first < self.last <= 1 or not 0 <= self.floor <= 1:
            raise PlanError(
                "penalty l2",
                got=f"first {self.first}, last {self.last}, floor {self.floor}",
                wanted="0 <= first < last <= 1 and 0 <= floor <= 1",
                next_step="Correct them.",
            )
        if not 0 < self.noise_fraction <= 1 or not 0 < self.noise_scale < float("inf"):
            raise PlanError(
                "penalty l2",
                got=f"noise_fraction {self.noise_fraction}, noise_scale {self.noise_scale}",
                wanted="a fraction above 0 and at most 1, and a scale above 0",
                next_step="Correct them.",
            )

    @property
    def data(self) -> frozenset[DataRole]:
        """Need knowledge where weights are measured."""
        return frozenset({"knowledge"}) if self.layers == "naie" else frozenset()

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Need the effect of each layer where weights are measured."""
        return frozenset({self._trace()}) if self.layers == "naie" else frozenset()

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Keep eta lambda_l; where the unit is relative, over the number of targets and what is compared with."""
        weights = self._weights(site)
        weight = _weight_of(weights, site) * self.strength
        if self.unit == "relative":
            start = (site.plan.init.A, site.plan.init.B) if self.on == "factors" else (site.weight,)
            whole = sum(float(part.double().square().sum()) for part in start)
            weight = weight / (len(site.targets) * whole) if whole else 0.0
        return {f"weight:{site.plan.target.name}": torch.tensor(weight), _MEASURED: torch.tensor(weights)}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Make (7) or (5) of one target."""
        target, weight = target_plan.target, tensors[f"weight:{target_plan.target.name}"]
        if self.on == "factors":
            return OnFactors(FactorNorm(weight))
        one = torch.ones_like(weight)
        return OnChange(
            KroneckerChange(
                Omega=Identity(target.in_features, one),
                Gamma=Identity(target.out_features, one),
                scale=target_plan.scale,
                weight=weight,
                start=start_of(target_plan, weight.device),
            )
        )

    def notes(self, plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
        """Tell the weights of the layers where they differ."""
        weights = tensors[_MEASURED].tolist()
        if len(set(weights)) == 1:
            return []
        return [f"penalty l2, weights of the layers from 0 on: {' '.join(f'{weight:.3g}' for weight in weights)}"]

    def _weights(self, site: Site) -> list[float]:
        if self.layers == "uniform":
            return [1.0] * site.blocks
        if self.layers == "cubic":
            return cubic_weights(site.blocks, self.first, self.last, self.floor)
        if self.layers == "naie":
            return self._measured(site)
        return list(self.layers)

    def _measured(self, site: Site) -> list[float]:
        effects = site.stats.derive(self._trace(), layer_weights)
        weights: list[float] = effects.tolist()
        return weights

    def _trace(self) -> LayerEffect:
        return LayerEffect(
            "knowledge",
            self.reading,
            self.noise_fraction,
            self.noise_scale,
            self.noise_seed,
            examples=self.trace_examples,
        )


def _weight_of(weights: Sequence[float], site: Site) -> float:
    """Look up the weight of a target's block; a target outside any block has the weight 1."""
    if len(weights) != site.blocks:
        raise PlanError(
            "penalty l2, layers",
            got=f"{len(weights)} weights",
            wanted=f"{site.blocks}, one per block of the model",
            next_step="Give one for each, also for blocks that are not tuned.",
        )
    layer = site.plan.target.layer
    return float(weights[layer]) if layer >= 0 else 1.0
