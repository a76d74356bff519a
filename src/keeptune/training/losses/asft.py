"""ASFT: Zhu et al., Anchored Supervised Fine-Tuning, 2509.23753 (ICLR 2026).

    l_t = -sg(p_t) log p_t + kl_weight KL(p_base(. | y_<t) || p(. | y_<t))                                      (1)

DFT (dft.py), held to the base on the task's own tokens; the direction of the KL is that of the released code. The base
is the model as it starts, in evaluation mode: a forward pass at each step.
"""

from dataclasses import dataclass

from torch import Tensor

from keeptune.core.options import Range
from keeptune.penalties.kl import kl_divergence
from keeptune.training.losses.dft import Dft


@dataclass(frozen=True)
class Asft(Dft):
    """DFT with a KL to the base on the task's tokens.

    Args:
        kl_weight: What a nat of KL weighs against a nat of the task's loss; 0 is DFT.
    """

    name = "asft"
    paper = "Zhu et al., ASFT, 2509.23753"
    reads = "base"
    ranges = {"kl_weight": Range(least=0)}

    kl_weight: float = 0.1

    def losses(self, log_probs: Tensor, answers: Tensor, base: Tensor) -> Tensor:
        """Computes (1)."""
        return super().losses(log_probs, answers, base) + self.kl_weight * kl_divergence(base, answers)
