"""DFT: Wu et al., On the Generalization of SFT: A Reinforcement Learning Perspective, 2508.05629 (ICLR 2026).

    l_t = -sg(p_t) log p_t                              p_t = p(y_t | y_<t); no gradient goes through sg        (1)
    grad l_t = -grad p_t                                as of a policy whose reward is to write y_t             (2)

Tokens that the model takes for unlikely teach less, in proportion. The number (1) itself is no measure of progress: it
is 0 at p = 1 and at p = 0, and highest at p = 1/e. TRL's ``loss_type="dft"`` is the same, bit for bit.
"""

from dataclasses import dataclass

from torch import Tensor

from keeptune.training.losses.base import TaskLoss


@dataclass(frozen=True)
class Dft(TaskLoss):
    """Each token's loss times its own probability."""

    name = "dft"
    paper = "Wu et al., DFT, 2508.05629"

    def losses(self, log_probs: Tensor, answers: Tensor, base: Tensor) -> Tensor:
        """Computes (1)."""
        return -log_probs * log_probs.exp().detach()
