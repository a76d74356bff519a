"""L2-LoRA: LoRA with a squared penalty on the weight change, strong where knowledge lives and weak elsewhere.

Zhang, Xie, Zhang, "L2-LoRA: Improving Low-Rank Adaptation with Layer-Specific Regularization".

    IE_(k,l)  = sum_t p(y_t | x_noise, v_(t,l)) - p(y_t | x_noise)                          (2)
    AIE_l     = mean_k IE_(k,l),   NAIE_l = AIE_l over the largest of them                   (3)
    L         = L_task + eta sum_l NAIE_l ‖ΔW_l‖²                                            (7)
    NAIE_l   ~= 1 for l < l_i; tau + (1 - tau) (1 - (l - l_i) / (l_f - l_i))³; tau for l > l_f (8)

(2) and (3) are measured by ``statistics/layer_effect.py`` on knowledge with answers (``layers="naie"``). (8) stands in
for them (``layers="cubic"``): it is what the paper's runs appear to use, and it is not taken from data. The penalty is
``penalties/l2.py``. Not in the paper: eta, tau, what the norm is, whether alpha / r is in it. Here the norm is that of
Frobenius, of s B A; ``unit="relative"`` divides each target's square by ‖W‖², so that one strength means the same on
every model; ``unit="absolute"`` at rank 32 is (7) as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keeptune.methods.lora import LoraStart
from keeptune.methods.strength import Strength
from keeptune.penalties.l2 import L2, Layers
from keeptune.statistics.layer_effect import Reading


@dataclass(frozen=True)
class L2Lora(LoraStart):
    """L2-LoRA.

    Args:
        strength: eta. With the relative unit, what a change as large as W itself costs, in nats.
        layers: Weight of each block: ``"cubic"`` (eq. 8), ``"naie"`` (eqs. 2 and 3, measured on the knowledge),
            ``"uniform"``, or a list, from block 0.
        on: ``"change"`` takes ``s B A`` (eq. 7), ``"factors"`` A and B (eq. 5).
        unit: ``"relative"`` measures each change against its W, ``"absolute"`` takes eq. 7 as it is.
        first: l_i as a share of the depth.
        last: l_f as a share of the depth.
        floor: tau, the least weight of the schedule.
        reading: Which reading of eq. 2 (naie).
        noise_fraction: Share of a prompt's tokens that get noise (naie).
        noise_scale: Its standard deviation, in units of that of the token embeddings (naie).
        trace_examples: How many examples of each knowledge set are traced (naie).

    Raises:
        PlanError: An option is out of range.
    """

    name = "l2-lora"
    paper = "Zhang et al., L2-LoRA"
    strength_option = Strength(("strength",), "multiplied")

    strength: float = 100.0
    layers: Layers = "cubic"
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
        """Checks the options, also those of the penalty."""
        super().__post_init__()
        self.penalties()

    def penalties(self) -> tuple[L2]:
        """Returns (7)."""
        return (L2.of(self),)
