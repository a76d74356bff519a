"""EAFT: Diao et al., Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting, 2601.02151.

    l_t = -sg(H(q_t) / log K)^alpha log p_t             q_t = p(. | y_<t) at its K = 20 largest, over their sum (1)

A token of which the model is sure teaches little, whether it is right or wrong: where it is wrong, plain training
overwrites most. The released code divides by 3, where log 20 is 2.996.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from keeptune.core.options import Range
from keeptune.training.losses.base import TaskLoss

_K = 20


def entropy_weight(answers: Tensor) -> Tensor:
    """Computes the normalised entropy H(q) / log K of rows of log-probabilities or logits, without a gradient.

    Laws: in [0, 1]; 0 for a certain answer, 1 where K tokens are equally likely.
    """
    log_q = answers.detach().topk(min(_K, answers.shape[-1]), dim=-1).values.log_softmax(dim=-1)
    return (-(log_q.exp() * log_q).sum(dim=-1) / math.log(log_q.shape[-1])).clamp(0, 1)


@dataclass(frozen=True)
class Eaft(TaskLoss):
    """Each token's loss times the entropy of the model's answer there.

    Args:
        alpha: The power of the normalised entropy; 0 is plain training.
    """

    name = "eaft"
    paper = "Diao et al., EAFT, 2601.02151"
    reads = "answers"
    ranges = {"alpha": Range(least=0)}

    alpha: float = 1.0

    def losses(self, log_probs: Tensor, answers: Tensor, base: Tensor) -> Tensor:
        """Computes (1)."""
        return -log_probs * entropy_weight(answers) ** self.alpha
