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
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.core.plan import TargetPlan
from keeptune.core.trained_tensors import TensorName
from keeptune.penalties.base import Site, Term
from keeptune.penalties.option_checks import check_strength
from keeptune.statistics.request import DataRole, Request

__all__ = ["Decay", "FactorDecay"]


@dataclass(frozen=True, slots=True, eq=False)
class FactorDecay:
    """``w / 2 (‖A‖² + ‖B‖²)`` of the trained ones.

    Args:
        weight: w, a scalar tensor.
        trained: Which of A and B.
    """

    weight: Tensor
    trained: tuple[TensorName, ...]

    def value_and_grad(self, factors: Mapping[TensorName, Tensor]) -> tuple[Tensor, Mapping[TensorName, Tensor]]:
        """Compute it; the gradients are ``w A`` and ``w B``."""
        squares = torch.stack([factors[name].square().sum() for name in self.trained])
        return self.weight / 2 * squares.sum(), {name: self.weight * factors[name] for name in self.trained}


@dataclass(frozen=True)
class Decay:
    """Weight decay on the trained factors, as a part of the loss.

    Args:
        strength: What half of all squares is multiplied by.

    Raises:
        PlanError: An option is out of range.
    """

    name: ClassVar[str] = "decay"
    paper: ClassVar[str] = "weight decay, coupled"

    strength: float = 0.01

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range.
        """
        check_strength(self.strength, self.name)

    @property
    def data(self) -> frozenset[DataRole]:
        """Need nothing."""
        return frozenset()

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Need nothing."""
        return frozenset()

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Keep the strength."""
        return {"strength": torch.tensor(self.strength)}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Make (1) of one target."""
        names: tuple[TensorName, ...] = ("A", "B")
        return FactorDecay(tensors["strength"], tuple(name for name in names if name in target_plan.trainable))
