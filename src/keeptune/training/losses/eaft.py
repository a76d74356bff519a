"""EAFT: Diao et al., Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting, 2601.02151.

    q = p over its K most likely tokens, divided by their sum                                                   (1)
    w_t = (H(q) / log K)^alpha                          in [0, 1]; H the entropy, no gradient goes through      (2)
    l_t = -w_t log p_t                                                                                          (3)

A token of which the model is sure teaches little, whether it is right or wrong: where it is wrong, plain training
overwrites most. K is 20. The released code divides by 3, where log 20 is 2.996.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from keeptune.core.options import Range
from keeptune.training.losses.base import TaskLoss

_K = 20


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

    def measure(self, answers: Tensor, base: Tensor) -> Tensor:
        """Computes (2)."""
        return entropy_weight(answers).pow(self.alpha)

    def losses(self, log_probs: Tensor, measured: Tensor) -> Tensor:
        """Computes (3)."""
        return -log_probs * measured


def entropy_weight(answers: Tensor) -> Tensor:
    """Computes the normalised entropy of the most likely tokens, (2) with alpha 1.

    Laws: 0 for a certain answer, 1 where K tokens are equally likely; a constant added to a row changes nothing.

    Args:
        answers: Log-probabilities or logits, ``(tokens, vocabulary)``.
    """
    log_q = answers.detach().topk(min(_K, answers.shape[-1]), dim=-1).values.log_softmax(dim=-1)
    return (-(log_q.exp() * log_q).sum(dim=-1) / math.log(log_q.shape[-1])).clamp(0, 1)
