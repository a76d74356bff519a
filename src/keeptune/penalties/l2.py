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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.options import Options, Range
from keeptune.core.plan import Plan, TargetPlan
from keeptune.linalg.symmetric import Identity
from keeptune.penalties.base import Penalty, Site, Term, on_factors, start_of
from keeptune.penalties.kronecker import kronecker_change
from keeptune.statistics.layer_effect import LayerEffect, Reading, layer_weights
from keeptune.statistics.request import DataRole, Request

Layers = Literal["uniform", "cubic", "naie"] | tuple[float, ...]
_MEASURED = "layer weights"


def cubic_weights(blocks: int, start: float = 1 / 3, end: float = 2 / 3, floor: float = 0.0) -> list[float]:
    """Computes the schedule that stands in for measured weights (L2-LoRA, eq. 8).

    1 for l < l_i; tau + (1 - tau) (1 - (l - l_i) / (l_f - l_i))³ for l_i <= l <= l_f; tau for l > l_f.

    Laws: it never rises; it is within [tau, 1]; 1 at l_i, tau at l_f.

    Args:
        blocks: L.
        start: l_i / L; the paper's is 1/3, not rounded.
        end: l_f / L; the paper's is 2/3.
        floor: tau.

    Returns:
        One weight per block, from block 0.

    >>> [round(weight, 3) for weight in cubic_weights(6)]
    [1.0, 1.0, 1.0, 0.125, 0.0, 0.0]
    """
    first, last = start * blocks, end * blocks
    weights = []
    for layer in range(blocks):
        passed = min(max((layer - first) / (last - first), 0.0), 1.0)
        weights.append(floor + (1 - floor) * (1 - passed) ** 3)
    return weights


@dataclass(frozen=True)
class L2Options(Options):
    """Options of what is squared, and of how layers weigh.

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
        trace_examples: How many examples of each knowledge set are traced, the first ones (naie).
    """

    ranges = {
        "strength": Range(least=0),
        "floor": Range(least=0, most=1),
        "noise_fraction": Range(above=0, most=1),
        "noise_scale": Range(above=0),
    }

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
    trace_examples: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, str):
            right = len(self.layers) > 0 and all(weight in Range(least=0) for weight in self.layers)
            self.need(right, "layers", "one weight of 0 or more per block", "Correct the list.")
        self.need(0 <= self.first < self.last <= 1, "first", f"0 <= first < last <= 1, with last {self.last}")


@dataclass(frozen=True)
class L2(L2Options, Penalty):
    """The squared size of the change, weighted by layer.

    Args:
        noise_seed: Seed of the noise (naie).
    """

    name = "l2"
    paper = "Zhang et al., L2-LoRA"

    noise_seed: int = 0

    @property
    def data(self) -> frozenset[DataRole]:
        """The knowledge where weights are measured."""
        return frozenset({"knowledge"}) if self.layers == "naie" else frozenset()

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Returns the effect of each layer where weights are measured."""
        return frozenset({self._trace}) if self.layers == "naie" else frozenset()

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Returns eta lambda_l; where the unit is relative, over the number of targets and what is compared with."""
        weights, layer = self._weights(site), site.plan.target.layer
        if len(weights) != site.blocks:
            raise PlanError(
                "penalty l2, layers",
                got=f"{len(weights)} weights",
                wanted=f"{site.blocks}, one per block of the model",
                next_step="Name one for each, also for blocks that are not tuned.",
            )
        weight = (float(weights[layer]) if layer >= 0 else 1.0) * self.strength  # 1 outside any block
        if self.unit == "relative":
            start = (site.plan.init.A, site.plan.init.B) if self.on == "factors" else (site.weight,)
            whole = sum(float(part.double().square().sum()) for part in start)
            weight = weight / (len(site.targets) * whole) if whole else 0.0
        return {f"weight:{site.plan.target.name}": torch.tensor(weight), _MEASURED: torch.tensor(weights)}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Returns (7) or (5) of one target."""
        target, weight = target_plan.target, tensors[f"weight:{target_plan.target.name}"]
        if self.on == "factors":

            def norm(delta: LowRank) -> tuple[Tensor, LowRank]:
                value = weight * (delta.A.square().sum() + delta.B.square().sum())
                return value, LowRank(B=2 * weight * delta.B, A=2 * weight * delta.A)

            return on_factors(norm)
        Omega, Gamma = (Identity(size, torch.ones_like(weight)) for size in (target.in_features, target.out_features))
        start = start_of(target_plan, weight.device)
        return on_factors(kronecker_change(Omega, Gamma, target_plan.scale, weight, start))

    def notes(self, plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
        """Returns the weights of the layers where they differ."""
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
            weights: list[float] = site.stats.derive(self._trace, layer_weights).tolist()
            return weights
        return list(self.layers)

    @property
    def _trace(self) -> LayerEffect:
        return LayerEffect(
            "knowledge",
            self.reading,
            self.noise_fraction,
            self.noise_scale,
            self.noise_seed,
            examples=self.trace_examples,
        )
