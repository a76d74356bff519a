"""Weight decay on the factors: hold A and B near zero.

    P = strength / 2 sum_t (‖A_t‖² + ‖B_t‖²)         over the trained factors of every target t              (1)

(1) is part of the loss: its gradient, ``strength A``, is clipped with the task's and goes through Adam's moments. The
trainer's own ``train.weight_decay`` is AdamW's, which is decoupled: it takes ``learning_rate weight_decay A`` off A
after the step, past clipping and moments. With plain gradient descent and no clipping the two are the same. Neither
knows what A and B mean: factors that start as a part of W are held near zero, not near their start. To hold the
change itself take ``l2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.options import Range
from keeptune.core.plan import TargetPlan
from keeptune.penalties.base import Factors, Penalty, Site, Term


@dataclass(frozen=True)
class Decay(Penalty):
    """Weight decay on the trained factors, as a part of the loss.

    Args:
        strength: What half of all squares is multiplied by.
    """

    name = "decay"
    paper = "weight decay, coupled"
    ranges = {"strength": Range(least=0)}

    strength: float = 0.01

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Returns the strength."""
        return {"strength": torch.tensor(self.strength)}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Returns (1) of one target."""
        weight = tensors["strength"]
        trained = [name for name in ("A", "B") if name in target_plan.trainable]

        def term(factors: Factors) -> tuple[Tensor, Factors]:
            squares = torch.stack([factors[name].square().sum() for name in trained])
            return weight / 2 * squares.sum(), {name: weight * factors[name] for name in trained}

        return term
