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

from dataclasses import dataclass
from typing import Self

from keeptune.methods.lora import LoraStart
from keeptune.penalties.l2 import L2, L2Options, Layers


@dataclass(frozen=True)
class L2Lora(L2Options, LoraStart):
    """L2-LoRA."""

    name = "l2-lora"
    paper = "Zhang et al., L2-LoRA"
    strength_option = ("strength", "multiplied")

    layers: Layers = "cubic"

    @classmethod
    def as_paper(cls, strength: float, *, rank: int = 32, layers: Layers = "cubic") -> Self:
        """Returns eq. 7 as it is written, with the paper's rank; the paper does not give ``strength``, its eta."""
        return cls(rank=rank, strength=strength, layers=layers, unit="absolute")

    def penalties(self) -> tuple[L2]:
        """Returns (7)."""
        return (L2.of(self),)
